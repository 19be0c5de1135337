"""Two servers on one PostgreSQL and one object store: what one registers both serve, whatever dies in between."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor
from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.api.operators import PROMPTS, Operator
from tests.fixtures.object_store import ObjectStoreServer, object_store
from tests.fixtures.postgres import Postgres, postgres
from tests.fixtures.tiny import TinyFamily, tiny_lora

__all__ = ["object_store", "postgres"]

CONVERGES_SECONDS = 2.0


@pytest.fixture(scope="module")
def root(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "one", family.base, rank=4, seed=71)
    tiny_lora(folder / "two", family.base, rank=2, seed=72)
    return folder


@pytest.fixture(scope="module")
def shared(postgres: Postgres, object_store: ObjectStoreServer, root: Path) -> dict[str, Any]:
    """Settings that all servers of a test have in common."""
    return {
        "admin_key": ADMIN_KEY,
        "experts_root": root,
        "catalogue": postgres.database(),
        "blobs": f"{object_store.bucket()}/registry",
        "blob_options": json.dumps(object_store.options),
        "expert_wait_seconds": 3,
    }


@dataclass(frozen=True)
class Pair:
    """Two servers, each with a folder of its own for what is neither in the database nor in the store."""

    here: Operator
    there: Operator
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(
    family: TinyFamily, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """The same for all of these tests; each has experts of its own."""
    folders = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    with (
        serving(family.bundle, **shared, state_dir=folders[0]) as first,
        serving(family.bundle, **shared, state_dir=folders[1]) as second,
    ):
        yield Pair(Operator(first), Operator(second), folders)


def asked(served: Served, **body: Any) -> httpx.Response:
    return served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1, **body})


def test_what_one_server_changes_both_serve_within_two_seconds(pair: Pair) -> None:
    here, there = pair.here, pair.there
    here.registered(name="colours", path="one", prompts=PROMPTS)
    changed = time.monotonic()
    # Named before it got there: waited for, never another's answer, never the base's.
    first = there.text(model="colours")
    assert time.monotonic() - changed < CONVERGES_SECONDS
    assert first == here.text(model="colours")
    assert first[1] == {"colours": 1}
    routed = there.served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]
    assert routed == here.served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]
    assert routed["gates"] == {"colours": 1.0}

    there.registered(name="colours", path="two", expected_generation=1, prompts=PROMPTS)
    assert eventually(lambda: here.text(model="colours")[1] == {"colours": 2}, CONVERGES_SECONDS)
    assert here.text(model="colours") == there.text(model="colours")

    assert here.post("/experts/colours/rollback", {}).status_code == 200
    assert eventually(lambda: there.text(model="colours") == first, CONVERGES_SECONDS)
    assert here.ask("PUT", "/aliases/paint", {"expert": "colours"}).status_code == 200
    assert eventually(lambda: asked(there.served, model="paint").status_code == 200, CONVERGES_SECONDS)
    assert there.ask("DELETE", "/experts/colours").status_code == 200
    assert eventually(lambda: asked(here.served, model="colours").status_code == 404, CONVERGES_SECONDS)

    def lags() -> set[int]:
        state = here.get("/registry")
        assert len(state["replicas"]) == 2
        return {state["revision"] - replica["revision"] for replica in state["replicas"]}

    assert eventually(lambda: lags() == {0})
    assert here.served.metric("twinserve_registry_replicas") == 2


def test_a_stale_precondition_is_refused_whichever_server_hears_it(pair: Pair) -> None:
    here, there = pair.here, pair.there
    here.registered(name="alpha", path="one", replace=True)
    stale = there.register(name="alpha", path="two", expected_generation=1)
    assert stale.status_code == 409
    refused = there.register(headers={"If-Match": '"1"'}, name="alpha", path="two")
    assert refused.status_code == 412
    [entry, *_] = there.get("/audit", target="alpha")["data"]
    assert entry["result"].startswith("refused")


def test_without_a_database_what_is_loaded_serves_and_afterwards_everything_is_followed_again(
    pair: Pair, postgres: Postgres
) -> None:
    here, there = pair.here, pair.there
    here.registered(name="shades", path="one", prompts=PROMPTS)
    truth = there.text(model="shades")
    assert eventually(lambda: there.get("/registry")["revision"] == here.get("/registry")["revision"])
    postgres.kill()
    try:
        for admin in (here, there):
            assert admin.text(model="shades") == truth
            refused = admin.ask("DELETE", "/experts/shades")
            assert refused.status_code == 503, refused.text
            assert error_of(refused)["code"] == "registry_unavailable"
            assert int(refused.headers["retry-after"]) >= 1
            unknown = asked(admin.served, model="nobody-knows")
            assert unknown.status_code == 503
            assert error_of(unknown)["code"] == "registry_unavailable"
            assert asked(admin.served).status_code == 200
        assert eventually(lambda: here.get("/registry")["problem"] != "")
        assert eventually(lambda: here.served.metric("twinserve_registry_up") == 0)
    finally:
        postgres.start()
    assert eventually(lambda: here.get("/registry")["problem"] == "", 20)
    assert eventually(lambda: there.get("/registry")["problem"] == "", 20)
    made = here.registered(name="shades", path="two", replace=True)
    assert made["generation"] == 2
    assert eventually(lambda: there.text(model="shades")[1] == {"shades": 2}, 10)
    assert asked(there.served, model="nobody-knows").status_code == 404


def test_an_expert_whose_files_do_not_come_is_an_error_and_no_other_expert(
    pair: Pair, shared: dict[str, Any], object_store: ObjectStoreServer
) -> None:
    here, there = pair.here, pair.there
    catalogue = Catalogue.open(shared["catalogue"])
    catalogue.set_state("beta", "disabled", Actor())
    assert eventually(lambda: asked(there.served, model="beta").status_code == 404)
    digest = catalogue.generation("beta", 1).files["expert.safetensors"].sha256
    url = f"{shared['blobs']}/{digest}"
    url = next(it for it in _objects(object_store, shared["blobs"]) if digest in it)
    content = object_store.content(url)
    object_store.damage(url, b"not an expert")
    for cached in (*(pair.folders[0] / "cache").rglob("*"), *(pair.folders[1] / "cache").rglob("*")):
        if cached.is_file():
            cached.unlink()
    catalogue.set_state("beta", "active", Actor())
    for admin in (here, there):
        assert eventually(lambda admin=admin: "beta@1" in admin.get("/registry")["broken"])
        answer = asked(admin.served, gates={"beta": 1.0})
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "expert_unavailable"
    object_store.damage(url, content)
    for admin in (here, there):
        assert eventually(lambda admin=admin: asked(admin.served, model="beta").status_code == 200, 20)
    catalogue.close()


def test_a_job_of_a_server_that_ends_goes_to_another_at_once(
    family: TinyFamily, shared: dict[str, Any], tmp_path: Path, postgres: Postgres
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    shared = {**shared, "catalogue": postgres.database()}
    with serving(family.bundle, **shared, state_dir=folders[0]) as first:
        begun = Operator(first).begin(name="colours", path="one", prompts=PROMPTS)
        assert begun.status_code == 202
        job = begun.json()["id"]
        assert eventually(lambda: Operator(first).job(job)["state"] != "queued")
    with serving(family.bundle, **shared, state_dir=folders[1]) as second:
        admin = Operator(second)
        assert admin.ended(job)["state"] == "succeeded"
        assert admin.text(model="colours")[1] == {"colours": 1}
        assert [it["id"] for it in admin.get("/registry")["replicas"]] == [admin.get("/registry")["replica"]]


def test_both_servers_answers_always_tell_the_generation_that_made_them(pair: Pair) -> None:
    here, there = pair.here, pair.there
    made = here.registered(name="moving", path="one")
    truth = {made["generation"]: here.text(model="moving")[0]}
    made = here.registered(name="moving", path="two", replace=True)
    truth[made["generation"]] = here.text(model="moving")[0]
    wrong: list[tuple[str, dict[str, int]]] = []
    served: list[int] = []
    done = threading.Event()

    def ask(admin: Operator) -> None:
        while not done.is_set():
            said, generations = admin.text(model="moving")
            served.append(generations["moving"])
            if truth[generations["moving"]] != said:
                wrong.append((said, generations))

    clients = [threading.Thread(target=ask, args=(admin,)) for admin in (here, there)]
    for client in clients:
        client.start()
    try:
        for number in (1, 2) * 6:
            answer = here.post("/experts/moving/activate", {"generation": number})
            assert answer.status_code == 200, answer.text
    finally:
        done.set()
        for client in clients:
            client.join()
    assert not wrong
    assert set(served) == {1, 2}


def _objects(store: ObjectStoreServer, url: str) -> list[str]:
    bucket = url.removeprefix("s3://").partition("/")[0]
    listed = store.client.list_objects_v2(Bucket=bucket)
    return [f"s3://{bucket}/{each['Key']}" for each in listed.get("Contents", [])]
