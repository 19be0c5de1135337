"""A registration or an expert that fails: nothing of it serves, all else goes on, also after a restart."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving, state_of
from tests.api.operators import ADMIN, PROMPTS, Operator, blob_of, worker_pids
from tests.fixtures.tiny import TinyFamily, tiny_lora


@pytest.fixture(scope="module")
def root(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, and one that is sound but too large for float16."""
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "lora", family.base, rank=4, seed=71)
    tiny_lora(folder / "huge", family.base, rank=4, seed=72, strength=3e2)
    return folder


@pytest.fixture
def path(family: TinyFamily, tmp_path: Path) -> Path:
    """A copy of the family's bundle with a registry of its own."""
    return Path(shutil.copytree(family.bundle, tmp_path / "bundle"))


@pytest.fixture
def options(root: Path) -> dict[str, Any]:
    huge = 1e15  # norms of any size: whether the model can hold them is what these tests are about
    return {"admin_key": ADMIN_KEY, "experts_root": root, "dtype": "float16", "max_norm_ratio": huge}


def register(served: Served, **body: Any) -> httpx.Response:
    return Operator(served).register(**body)


def retire(served: Served, name: str) -> httpx.Response:
    return served.http.delete(f"/admin/experts/{name}", headers=ADMIN)


def listed(served: Served) -> set[str]:
    """Names of experts wherever the server lists them; they must agree."""
    models = {m["id"] for m in served.http.get("/v1/models").json()["data"] if m["kind"] == "expert"}
    admin = {e["name"] for e in served.http.get("/admin/experts", headers=ADMIN).json()["data"]}
    [routed] = served.post("/v1/route", {"prompt": PROMPTS[0]}).json()["data"]
    assert models == admin
    assert set(routed["scores"]) <= models
    return models


def text(served: Served, **body: Any) -> str:
    answer = served.complete(**{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **body})
    return str(answer["choices"][0]["text"])


def test_an_expert_that_the_model_rejects_is_registered_nowhere(path: Path, options: dict[str, Any]) -> None:
    manifest = (path / "manifest.json").read_bytes()
    with serving(path, **options) as served:
        router = served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["router_generation"]
        for _ in range(2):
            answer = register(served, name="new", path="huge", prompts=PROMPTS)
            assert answer.status_code == 422, answer.text
            assert error_of(answer)["code"] == "expert_rejected"
            assert "float16" in error_of(answer)["message"]
        assert listed(served) == {"alpha", "beta", "gamma"}
        assert served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["router_generation"] == router
        assert (path / "manifest.json").read_bytes() == manifest

        sound = register(served, name="new", path="lora", prompts=PROMPTS)
        assert sound.status_code == 201, sound.text
        assert sound.json()["routed"] is True
    with serving(path, **options) as restarted:
        assert listed(restarted) == {"alpha", "beta", "gamma", "new"}
        assert restarted.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["gates"] == {"new": 1.0}


def test_a_replacement_that_the_model_rejects_leaves_the_old_generation_in_place(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **options) as served:
        first = text(served, model="alpha")
        answer = register(served, name="alpha", path="huge", replace=True)
        assert answer.status_code == 422, answer.text
        assert text(served, model="alpha") == first
        assert Operator(served).get("/experts/alpha")["generation"] == 1
        replaced = register(served, name="alpha", path="lora", expected_generation=1)
        assert replaced.status_code == 201, replaced.text
        assert replaced.json()["generation"] == 3
        assert text(served, model="alpha") != first
    with serving(path, **options) as restarted:
        assert Operator(restarted).get("/experts/alpha")["generation"] == 3


def test_a_server_starts_without_an_expert_that_its_model_rejects_and_never_answers_in_its_place(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **{**options, "dtype": "float32"}) as served:
        assert register(served, name="huge", path="huge", prompts=PROMPTS).status_code == 201
    with serving(path, **options) as served:
        admin = Operator(served)
        refused = served.post("/v1/completions", {"model": "huge", "prompt": "a"})
        assert refused.status_code == 503, refused.text
        assert error_of(refused)["code"] == "expert_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        assert "huge@1" in admin.get("/registry")["broken"]
        assert admin.get("/experts/huge")["loaded"] is False
        routed = served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["generations"]
        assert routed.keys() <= {"alpha", "beta", "gamma"}

        # Another expert's change must not bring it back into the router's choice.
        assert retire(served, "beta").status_code == 200
        [scored] = served.post("/v1/route", {"prompt": PROMPTS[0]}).json()["data"]
        assert scored["scores"].keys() <= {"alpha", "gamma"}

        gone = retire(served, "huge")
        assert (gone.status_code, gone.json()["state"], gone.json()["generation"]) == (200, "retired", 1)
        assert retire(served, "huge").status_code == 404
        assert listed(served) == {"alpha", "gamma"}
        assert served.post("/v1/completions", {"model": "huge", "prompt": "a"}).status_code == 404
        assert not admin.get("/registry")["broken"]


def test_an_expert_whose_files_are_damaged_is_503_until_it_is_replaced_or_retired(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **options) as served:
        made = register(served, name="new", path="lora")
        assert made.status_code == 201, made.text
        first = text(served, model="new")
    weights = blob_of(state_of(path), "new", 1)
    weights.chmod(0o644)
    weights.write_bytes(bytes(weights.stat().st_size))
    shutil.rmtree(state_of(path) / "cache", ignore_errors=True)
    with serving(path, **options) as served:
        refused = served.post("/v1/completions", {"model": "new", "prompt": "a"})
        assert refused.status_code == 503, refused.text
        assert error_of(refused)["code"] == "expert_unavailable"
        assert str(path) not in refused.text
        assert text(served, model="alpha")
        replaced = register(served, name="new", path="lora", replace=True)
        assert replaced.status_code == 201, replaced.text
        assert text(served, model="new") == first
        assert served.complete(model="new", max_tokens=1)["routing"]["generations"] == {"new": 2}


def test_a_registration_that_takes_too_long_is_stopped_and_registers_nothing(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **options, registration_seconds=0.01) as served:
        admin = Operator(served)
        answer = admin.register(name="slow", path="lora", prompts=PROMPTS)
        assert answer.status_code == 504, answer.text
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("registration_timeout", "server_error")
        assert "TWINSERVE_REGISTRATION_SECONDS" in error["message"]
        assert listed(served) == {"alpha", "beta", "gamma"}
        assert retire(served, "beta").status_code == 200


def test_a_server_that_ends_leaves_no_worker_behind(path: Path, options: dict[str, Any]) -> None:
    before = set(worker_pids())
    with serving(path, **options) as served:
        assert register(served, name="new", path="lora").status_code == 201
        assert eventually(lambda: bool(set(worker_pids()) - before))
    assert eventually(lambda: set(worker_pids()) <= before)
