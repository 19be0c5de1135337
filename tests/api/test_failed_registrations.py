"""A registration that fails late, hangs or comes in a crowd: disk and runtime agree afterwards, nobody waits long."""

import logging
import multiprocessing
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from experts.bundle import Bundle
from experts.registry import describe_source, prepare_expert, refit_router
from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.fixtures.tiny import TinyFamily, tiny_lora

ADMIN = {"X-API-Key": ADMIN_KEY}
PROMPTS = [f"%% {word} {i} %%" for i, word in enumerate(["red", "blue", "pink", "teal", "gold"] * 2)]


@pytest.fixture(scope="module")
def root(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, and one that is sound but too large for float16."""
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "lora", family.base, rank=4, seed=71)
    tiny_lora(folder / "huge", family.base, rank=4, seed=72, strength=1e4)
    return folder


@pytest.fixture
def path(family: TinyFamily, tmp_path: Path) -> Path:
    """A copy of the family's bundle that a test may change."""
    return Path(shutil.copytree(family.bundle, tmp_path / "bundle"))


@pytest.fixture
def options(root: Path) -> dict[str, Any]:
    return {"admin_key": ADMIN_KEY, "experts_root": root, "dtype": "float16"}


def register(served: Served, **body: Any) -> httpx.Response:
    return served.post("/admin/experts", body, headers=ADMIN)


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
    before = Bundle.open(path).manifest
    with serving(path, **options) as served:
        for _ in range(2):
            answer = register(served, name="new", path="huge", prompts=PROMPTS)
            assert answer.status_code == 422, answer.text
            assert error_of(answer)["code"] == "expert_rejected"
            assert "float16" in error_of(answer)["message"]
        assert retire(served, "new").status_code == 404
        assert listed(served) == {"alpha", "beta", "gamma"}
        after = Bundle.open(path).manifest
        assert (after.experts, after.router) == (before.experts, before.router)

        sound = register(served, name="new", path="lora", prompts=PROMPTS)
        assert sound.status_code == 201, sound.text
        assert sound.json()["routed"] is True
    with serving(path, **options) as restarted:
        assert listed(restarted) == {"alpha", "beta", "gamma", "new"}
        assert restarted.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["gates"] == {"new": 1.0}


def test_a_replacement_that_the_model_rejects_leaves_the_old_generation_on_disk_and_live(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **options) as served:
        first = text(served, model="alpha")
        answer = register(served, name="alpha", path="huge", replace=True)
        assert answer.status_code == 422, answer.text
        assert text(served, model="alpha") == first
        assert served.http.get("/admin/experts/alpha", headers=ADMIN).json()["generation"] == 1
        assert Bundle.open(path).entry("alpha").generation == 1
        replaced = register(served, name="alpha", path="lora", expected_generation=1)
        assert replaced.status_code == 201, replaced.text
        assert text(served, model="alpha") != first
    with serving(path, **options) as restarted:
        assert (
            restarted.http.get("/admin/experts/alpha", headers=ADMIN).json()["generation"]
            == (replaced.json()["generation"])
        )


def test_a_server_starts_without_an_expert_that_its_model_rejects_and_can_retire_it(
    path: Path, root: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(path)
    features = torch.randn(20, bundle.router().spec.size(64))
    bundle.publish_expert(
        prepare_expert(bundle, "huge", root / "huge"),
        "huge",
        refit_router(bundle, "huge", features),
        None,
        describe_source(root / "huge"),
    )
    with caplog.at_level(logging.ERROR), serving(path, **options) as served:
        [record] = [record for record in caplog.records if record.name == "service.runtime.opening"]
        assert "huge" in record.getMessage()
        assert "float16" in record.getMessage()
        assert listed(served) == {"alpha", "beta", "gamma"}
        assert served.post("/v1/completions", {"model": "huge", "prompt": "a"}).status_code == 404
        assert served.http.get("/admin/experts/huge", headers=ADMIN).status_code == 404
        assert register(served, name="huge", path="lora").status_code == 409

        # Another expert's change must not bring it back into the router's choice.
        assert retire(served, "beta").status_code == 200
        assert listed(served) == {"alpha", "gamma"}

        gone = retire(served, "huge")
        assert gone.status_code == 200, gone.text
        assert (gone.json()["state"], gone.json()["generation"]) == ("retired", 1)
        assert retire(served, "huge").status_code == 404
        assert Bundle.open(path).expert_names() == ("alpha", "gamma")


def test_an_expert_that_vanished_from_the_disk_can_still_be_retired(
    path: Path, options: dict[str, Any]
) -> None:
    with serving(path, **options) as served:
        Bundle.open(path).retire_expert("beta")
        assert "beta" in listed(served)
        assert retire(served, "beta").json()["state"] == "retired"
        assert listed(served) == {"alpha", "gamma"}


def test_a_registration_that_takes_too_long_is_stopped_and_registers_nothing(
    path: Path, options: dict[str, Any]
) -> None:
    manifest = (path / "manifest.json").read_bytes()
    with serving(path, **options, registration_seconds=0.2) as served:
        answer = register(served, name="slow", path="lora")
        assert answer.status_code == 504, answer.text
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("registration_timeout", "server_error")
        assert "TWINSERVE_REGISTRATION_SECONDS" in error["message"]
        assert not multiprocessing.active_children()
        assert (path / "manifest.json").read_bytes() == manifest
        assert retire(served, "slow").status_code == 404
        assert retire(served, "beta").status_code == 200


def test_registrations_beyond_the_limit_are_refused_at_once(path: Path, options: dict[str, Any]) -> None:
    with serving(path, **options, max_registrations=1) as served:
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(register(served, name="new", path="lora")))
        first.start()
        try:
            assert eventually(lambda: bool(multiprocessing.active_children()))
            for refused in (register(served, name="other", path="lora"), retire(served, "beta")):
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert error_of(refused)["code"] == "queue_full"
                assert "TWINSERVE_MAX_REGISTRATIONS" in error_of(refused)["message"]
        finally:
            first.join()
        assert answers[0].status_code == 201, answers[0].text
        assert retire(served, "beta").status_code == 200
