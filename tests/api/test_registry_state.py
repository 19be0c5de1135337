"""What one server's registry keeps: over restarts, on a read-only disk, with a damaged file, with any clock."""

import contextlib
import datetime
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts.bundle import Bundle
from experts.errors import BundleError
from experts.registry.catalogue import rows
from service.registrar import open_registry
from service.settings import Settings
from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.api.operators import PROMPTS, Operator, blob_of
from tests.fixtures.mounts import mounted
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora


@pytest.fixture(scope="module")
def root(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs."""
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "one", family.base, rank=4, seed=71)
    tiny_lora(folder / "two", family.base, rank=2, seed=72)
    return folder


@pytest.fixture
def options(root: Path, tmp_path: Path) -> dict[str, Any]:
    return {"admin_key": ADMIN_KEY, "experts_root": root, "state_dir": tmp_path / "state"}


@contextlib.contextmanager
def operating(bundle: Path, **options: Any) -> Iterator[Operator]:
    with serving(bundle, **options) as served:
        yield Operator(served)


def test_what_was_registered_changed_and_retired_is_so_after_a_restart(
    family: TinyFamily, options: dict[str, Any]
) -> None:
    with operating(family.bundle, **options) as admin:
        made = admin.registered(name="colours", path="one", prompts=PROMPTS)
        assert (made["generation"], made["routed"]) == (1, True)
        first = admin.text(model="colours")
        admin.registered(name="colours", path="two", expected_generation=1, prompts=PROMPTS)
        second = admin.text(model="colours")
        assert (first[1], second[1]) == ({"colours": 1}, {"colours": 2})
        assert first[0] != second[0]
        assert admin.ask("DELETE", "/experts/beta").status_code == 200
        assert admin.ask("PUT", "/aliases/paint", {"expert": "colours"}).status_code == 200
        revision = admin.get("/registry")["revision"]
    with operating(family.bundle, **options) as admin:
        assert admin.text(model="colours") == second
        assert admin.text(model="paint") == second
        assert admin.served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["gates"] == {"colours": 1.0}
        assert {each["name"] for each in admin.get("/experts")["data"]} == {"alpha", "gamma", "colours"}
        assert admin.get("/registry")["revision"] == revision
        assert admin.post("/experts/colours/rollback", {}).status_code == 200
        assert admin.text(model="colours") == first
    with operating(family.bundle, **options) as admin:
        assert admin.text(model="colours") == first
    # The bundle is what it was when it was built.
    assert Bundle.open(family.bundle).expert_names() == ("alpha", "beta", "gamma")


def test_the_registry_lies_beside_the_bundle_unless_it_is_put_elsewhere(tmp_path: Path, root: Path) -> None:
    own = tiny_family(tmp_path)
    with operating(own.bundle, admin_key=ADMIN_KEY, experts_root=root, state_dir=None) as admin:
        assert admin.post("/experts/beta/disable").status_code == 200
    assert (own.bundle / "registry" / "catalogue.sqlite").is_file()
    assert Bundle.open(own.bundle).expert_names() == ("alpha", "beta", "gamma")
    with operating(own.bundle, admin_key=ADMIN_KEY, experts_root=root, state_dir=None) as admin:
        assert admin.get("/experts/beta")["state"] == "disabled"


def test_a_bundle_of_another_build_is_not_served_in_place_of_the_registrys(
    family: TinyFamily, options: dict[str, Any], tmp_path: Path
) -> None:
    open_registry(Settings(bundle=family.bundle, **options)).close()
    other = tiny_family(tmp_path / "other")
    with pytest.raises(BundleError, match=r"TWINSERVE_STATE_DIR.*POST /admin/bundles"):
        open_registry(Settings(bundle=other.bundle, **options))


def test_a_read_only_registry_serves_what_is_there_and_refuses_changes(
    family: TinyFamily, options: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    with operating(family.bundle, **options) as admin:
        admin.registered(name="colours", path="one")
        expected = admin.text(model="colours")
    with frozen_server(family.bundle, options) as url, httpx.Client(base_url=url, timeout=30) as http:
        admin = Operator(Served(url, None, http))
        assert admin.text(model="colours") == expected
        refused = admin.ask("DELETE", "/experts/colours")
        assert refused.status_code == 503, refused.text
        assert error_of(refused)["code"] == "registry_unavailable"
        assert "TWINSERVE_STATE_DIR" in error_of(refused)["message"]
        assert admin.begin(name="new", path="two").status_code == 503
        assert admin.text(model="colours") == expected
        assert admin.get("/registry")["writable"] is False


@contextlib.contextmanager
def frozen_server(bundle: Path, options: dict[str, Any]) -> Iterator[str]:
    """The URL of a server, a process of its own, that sees its state folder mounted read-only."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && echo mounted && exec "$@"'
    state = options["state_dir"]
    environment = {f"TWINSERVE_{name.upper()}": str(value) for name, value in options.items()}
    fixed = {"TWINSERVE_DTYPE": "float32", "TWINSERVE_MIX_MODE": "factored", "TWINSERVE_PORT": "0"}
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(state)]
    command += [sys.executable, "-m", "service", "serve", "--bundle", str(bundle)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **fixed, "TWINSERVE_THREADS": "1"},
    ) as server:
        assert server.stdout is not None
        try:
            if server.stdout.readline() != "mounted\n":
                pytest.skip("this machine lets nobody mount")
            for line in server.stdout:
                found = re.search(r"http://[0-9.]+:[0-9]+", line)
                if found:
                    yield found.group()
                    break
        finally:
            server.terminate()
            server.wait(30)


def test_a_read_only_bundle_without_a_registry_is_served_as_it_was_built(
    family: TinyFamily, root: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "built"
    shutil.copytree(family.bundle, bundle, ignore=shutil.ignore_patterns("registry"))
    with (
        mounted(tmp_path / "frozen", "64m", frozen=bundle) as frozen,
        operating(frozen, admin_key=ADMIN_KEY, experts_root=root, state_dir=None) as admin,
    ):
        assert admin.text(model="beta")[1] == {"beta": 1}
        assert admin.ask("DELETE", "/experts/beta").status_code == 503


def test_a_damaged_expert_is_left_out_told_of_and_served_again_once_it_is_mended(
    family: TinyFamily, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with operating(family.bundle, **options) as admin:
        truth = {name: admin.text(model=name) for name in ("alpha", "beta")}
        revision = admin.get("/registry")["revision"]
    state = options["state_dir"]
    shutil.rmtree(state / "cache")
    blob = blob_of(state, "beta", 1)
    content = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(content[:-4] + b"\x00\x01\x02\x03")
    with caplog.at_level(logging.ERROR), operating(family.bundle, **options) as admin:
        assert admin.text(model="alpha") == truth["alpha"]
        assert eventually(lambda: "beta@1" in admin.get("/registry")["broken"])
        for body in ({"model": "beta"}, {"gates": {"beta": 1.0}}, {"model": "beta@1"}):
            answer = admin.served.post("/v1/completions", {"model": "tiny", "prompt": "a", **body})
            assert answer.status_code == 503, answer.text
            assert error_of(answer)["code"] == "expert_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
        [routed] = admin.served.post("/v1/route", {"prompt": "¿Cómo se dice «river» en español?"}).json()[
            "data"
        ]
        assert routed["scores"].keys() == {"alpha", "gamma"}
        assert admin.served.metric("twinserve_registry_broken_experts") == 1
        assert admin.get("/experts/beta")["loaded"] is False
        assert any("beta@1" in record.getMessage() for record in caplog.records)

        blob.write_bytes(content)
        assert eventually(lambda: not admin.get("/registry")["broken"], 20)
        assert admin.text(model="beta") == truth["beta"]
        assert admin.get("/registry")["revision"] == revision


def test_another_generation_takes_a_damaged_ones_place_only_by_a_rollback(
    family: TinyFamily, options: dict[str, Any]
) -> None:
    with operating(family.bundle, **options) as admin:
        first = admin.text(model="alpha")
        admin.registered(name="alpha", path="one", replace=True)
    state = options["state_dir"]
    shutil.rmtree(state / "cache")
    blob_of(state, "alpha", 2).unlink()
    with operating(family.bundle, **options) as admin:
        assert eventually(lambda: "alpha@2" in admin.get("/registry")["broken"])
        refused = admin.served.post("/v1/completions", {"model": "alpha", "prompt": "a"})
        assert refused.status_code == 503
        assert admin.post("/experts/alpha/rollback", {}).status_code == 200
        assert admin.text(model="alpha") == first
        assert admin.get("/registry")["broken"] == {}


def test_no_jump_of_the_clock_mixes_generations_or_ends_the_server(
    family: TinyFamily, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with operating(family.bundle, **options) as admin:
        for number, year in enumerate((2001, 2099, 1999), 1):
            moment = datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)
            for module in _modules_with_a_clock():
                monkeypatch.setattr(module, "now", lambda moment=moment: moment)
            path = "one" if number % 2 else "two"
            made = admin.registered(name="colours", path=path, replace=True)
            assert made["generation"] == number
            assert admin.text(model="colours")[1] == {"colours": number}
            listed = admin.get("/experts/colours/generations")["data"]
            assert [each["generation"] for each in listed] == list(range(number, 0, -1))
        assert len(admin.get("/registry")["replicas"]) == 1
    with operating(family.bundle, **options) as admin:
        assert admin.text(model="colours")[1] == {"colours": 3}


def _modules_with_a_clock() -> list[Any]:
    """Everything in the catalogue that asks what time it is."""
    import experts.registry.catalogue as package

    members = [rows, *(getattr(package, name) for name in dir(package))]
    return [module for module in members if hasattr(module, "now")]


def test_two_administrators_at_once_replace_an_expert_once(
    family: TinyFamily, options: dict[str, Any]
) -> None:
    with operating(family.bundle, **options) as admin:
        states: list[int] = []
        both = [
            threading.Thread(
                target=lambda: states.append(
                    admin.register(name="alpha", path="one", expected_generation=1).status_code
                )
            )
            for _ in range(2)
        ]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert sorted(states) == [201, 409]
        assert admin.get("/experts/alpha")["generation"] == 2


def test_a_name_that_is_nowhere_is_unknown_at_once(family: TinyFamily, options: dict[str, Any]) -> None:
    with serving(family.bundle, **options, expert_wait_seconds=30) as served:
        assert _asks(served, "nobody") == 404
        assert _asks(served, "alpha@7") == 404


def _asks(served: Served, model: str) -> int:
    return served.post("/v1/completions", {"model": model, "prompt": "a"}, timeout=5).status_code


def test_a_canary_gets_its_share_until_it_is_ended_or_goes_live(
    family: TinyFamily, options: dict[str, Any]
) -> None:
    prompt = "¿Cómo se dice «river» en español?"

    def generation(admin: Operator) -> int:
        generations = admin.served.complete(prompt=prompt, max_tokens=1)["routing"]["generations"]
        return int(generations["beta"])

    with operating(family.bundle, **options) as admin:
        assert generation(admin) == 1
        begun = admin.begin(name="beta", path="one", replace=True, trial={"kind": "canary", "percent": 100})
        assert admin.ended(begun.json()["id"])["state"] == "succeeded"
        assert eventually(lambda: generation(admin) == 2)
        assert admin.text(model="beta")[1] == {"beta": 1}
        assert admin.get("/experts/beta")["generation"] == 1
    with operating(family.bundle, **options) as admin:
        assert eventually(lambda: generation(admin) == 2)
        assert admin.text(model="beta")[1] == {"beta": 1}
        assert admin.ask("DELETE", "/experts/beta/trial").status_code == 200
        assert generation(admin) == 1
        held = admin.get("/experts/beta")["in_memory"]
        assert held.keys() == {"1"}
        assert admin.post("/experts/beta/activate", {"generation": 2}).status_code == 200
        assert generation(admin) == 2
        assert admin.text(model="beta")[1] == {"beta": 2}
