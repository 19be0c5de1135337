"""Another bundle takes the served one's place while requests run, on every server and after a restart."""

import threading
from pathlib import Path
from typing import Any

import pytest

from experts.bundle import Bundle
from experts.bundle_manifest import MANIFEST_NAME
from experts.merging.methods import TaskArithmetic
from experts.registry.adopting import bundle_generations, bundle_router
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, BundleRecord
from tests.api.harness import ADMIN_KEY, eventually, serving
from tests.api.operators import PROMPTS, Operator
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """The same experts over the same base, with another shared expert."""
    return tiny_family(tmp_path_factory.mktemp("other"), method=TaskArithmetic(scale=0.6))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    # Nobody but the test may claim the job that it makes.
    return {"admin_key": ADMIN_KEY, "state_dir": tmp_path / "state", "registry_poll_seconds": 30}


def switch(catalogue: Catalogue, state: Path, bundle: Bundle) -> None:
    """What a job does in the end that has built a bundle."""
    blobs = Blobs.open(str(state / "blobs"), state / "cache")
    files = {name: blobs.put(bundle.path / name) for name in (*bundle.manifest.files, MANIFEST_NAME)}
    record = BundleRecord(bundle.manifest.build_id, bundle.name, bundle.manifest.model_dump_json(), files)
    job = catalogue.submit("rebuild", {}, Actor(), limit=8)
    claimed = catalogue.claim("test")
    assert claimed is not None
    assert claimed.id == job.id
    router = bundle_router(bundle)
    catalogue.switch_bundle(job.id, claimed.attempt, record, bundle_generations(bundle), router, result={})


def switch_once(state: Path, bundle: Bundle) -> None:
    """The same, by a catalogue that is closed again."""
    catalogue = Catalogue.open(f"sqlite:///{state / 'catalogue.sqlite'}")
    try:
        switch(catalogue, state, bundle)
    finally:
        catalogue.close()


def test_a_new_bundle_takes_over_without_a_lost_request_and_serves_after_a_restart(
    family: TinyFamily, other: TinyFamily, options: dict[str, Any], tmp_path: Path
) -> None:
    state = options["state_dir"]
    bundle = Bundle.open(other.bundle)
    with serving(other.bundle, admin_key=ADMIN_KEY, state_dir=tmp_path / "truth") as served:
        expected = Operator(served).text(model="alpha", max_tokens=40)[0]
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        before = admin.text(model="alpha", max_tokens=40)[0]
        assert before != expected
        truth = {1: before, 2: expected}
        wrong: list[dict[str, int]] = []
        seen: set[int] = set()
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                said, generations = admin.text(model="alpha", max_tokens=40)
                seen.add(generations["alpha"])
                if truth[generations["alpha"]] != said:
                    wrong.append(generations)

        client = threading.Thread(target=ask)
        client.start()
        catalogue = Catalogue.open(f"sqlite:///{state / 'catalogue.sqlite'}")
        try:
            switch(catalogue, state, bundle)
            assert eventually(lambda: 2 in seen, 30)
        finally:
            catalogue.close()
            done.set()
            client.join()
        assert not wrong
        assert admin.get("/registry")["build_id"] == bundle.manifest.build_id
        assert admin.post("/experts/beta/disable").status_code == 200
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        assert admin.text(model="alpha", max_tokens=40) == (expected, {"alpha": 2})
        assert admin.get("/experts/beta")["state"] == "disabled"
        assert (state / "bundles" / bundle.manifest.build_id / MANIFEST_NAME).is_file()


def test_the_bundle_before_serves_again_with_its_generations_and_is_left_again(
    family: TinyFamily, other: TinyFamily, options: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    tiny_lora(root / "one", family.base, rank=4, seed=71)
    options = {**options, "registry_poll_seconds": 0.2, "experts_root": root}
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        first = admin.get("/registry")["build_id"]
        before = admin.text(model="alpha")
        switch_once(options["state_dir"], Bundle.open(other.bundle))
        assert eventually(lambda: admin.text(model="alpha")[1] == {"alpha": 2}, 30)
        after = admin.text(model="alpha")
        listed = admin.get("/bundles")["data"]
        assert [(it["state"], it["returnable"]) for it in listed] == [("active", False), ("superseded", True)]
        second = listed[0]["build_id"]
        admin.registered(name="colours", path="one")
        refused = admin.post(f"/bundles/{first}/activate")
        assert refused.status_code == 409, refused.text
        assert "'colours'" in refused.json()["error"]["message"]
        assert admin.text(model="alpha") == after
        assert admin.post("/registry/gc").status_code == 200
        back = admin.post(f"/bundles/{first}/activate", {"absent": "retire"})
        assert back.status_code == 200, back.text
        assert (back.json()["build_id"], back.json()["state"]) == (first, "active")
        assert eventually(lambda: admin.text(model="alpha") == before, 30)
        assert [it["name"] for it in admin.get("/experts")["data"]] == sorted(family.fine_tunes)
        unknown = admin.post("/bundles/nothing/activate")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "record_not_found")
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        assert admin.text(model="alpha") == before
        assert admin.post(f"/bundles/{second}/activate").status_code == 200
        assert eventually(lambda: admin.text(model="alpha") == after, 30)
        assert admin.get("/experts/colours")["state"] == "active"


def test_a_bundle_that_this_server_has_nowhere_is_not_returned_to(
    family: TinyFamily, other: TinyFamily, options: dict[str, Any]
) -> None:
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        first = admin.get("/registry")["build_id"]
        switch_once(options["state_dir"], Bundle.open(other.bundle))
        assert eventually(lambda: admin.text(model="alpha")[1] == {"alpha": 2}, 30)
    with serving(other.bundle, **options) as served:
        admin = Operator(served)
        after = admin.text(model="alpha")
        refused = admin.post(f"/bundles/{first}/activate")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_state"), refused.text
        assert "TWINSERVE_BUNDLE" in refused.json()["error"]["message"]
        assert admin.get("/registry")["problem"] == ""
        assert admin.text(model="alpha") == after


def test_a_bundle_that_cannot_be_had_leaves_the_old_one_serving(
    family: TinyFamily, other: TinyFamily, options: dict[str, Any]
) -> None:
    state = options["state_dir"]
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        truth = admin.text(model="alpha")
        digest = Bundle.open(other.bundle).manifest.files["base_delta.safetensors"].sha256
        catalogue = Catalogue.open(f"sqlite:///{state / 'catalogue.sqlite'}")
        switch(catalogue, state, Bundle.open(other.bundle))
        [blob] = [path for path in (state / "blobs").rglob(f"*{digest[8:]}*") if path.is_file()]
        content = blob.read_bytes()
        blob.unlink()
        assert eventually(lambda: admin.get("/registry")["problem"] != "", 20)
        assert admin.text(model="alpha") == truth
        blob.write_bytes(content)
        assert eventually(lambda: admin.text(model="alpha")[1] == {"alpha": 2}, 30)
        assert eventually(lambda: admin.get("/registry")["problem"] == "", 20)
        catalogue.close()


def test_a_bundle_is_rebuilt_over_all_experts_that_serve_and_goes_on_from_there(
    family: TinyFamily, options: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    tiny_lora(root / "one", family.base, rank=4, seed=71)
    tiny_lora(root / "two", family.base, rank=2, seed=72)
    options = {**options, "registry_poll_seconds": 0.2, "experts_root": root}
    with serving(family.bundle, **options) as served:
        admin = Operator(served)
        admin.registered(name="colours", path="one", prompts=PROMPTS)
        before = admin.get("/registry")["build_id"]
        begun = admin.post("/bundles", {})
        assert begun.status_code == 202, begun.text
        ended = admin.ended(begun.json()["id"])
        assert ended["state"] == "succeeded", ended
        assert eventually(lambda: admin.get("/registry")["build_id"] != before, 20)
        rebuilt = admin.text(model="colours")
        assert rebuilt[1] == {"colours": 2}
        assert admin.text(model="alpha")[1] == {"alpha": 2}
        assert admin.served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["gates"] == {"colours": 1.0}
        assert admin.registered(name="later", path="two")["generation"] == 1
        later = admin.text(model="later")
        assert admin.served.metric('twinserve_registry_jobs_total{kind="rebuild",state="succeeded"}') == 1
        assert admin.served.metric('twinserve_registry_jobs_total{kind="register",state="succeeded"}') == 2
        assert admin.served.metric('twinserve_registry_job_seconds_count{kind="register"}') == 2
    with serving(family.bundle, **options) as served:
        assert Operator(served).text(model="colours") == rebuilt
        assert Operator(served).text(model="later") == later
