"""Experts come and go while requests run."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.bundle import Bundle
from tests.api.harness import ADMIN_KEY, Served, error_of, serving
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_fine_tune, tiny_lora, tiny_model

ADMIN = {"X-API-Key": ADMIN_KEY}
PROMPTS = [f"%% {word} {i} %%" for i, word in enumerate(["red", "blue", "pink", "teal", "gold"] * 3)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose bundle these tests change."""
    return tiny_family(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def root(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to register from: a LoRA, another, and a full fine-tune."""
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "lora", own.base, rank=4, seed=71)
    tiny_lora(folder / "deep" / "other", own.base, rank=2, seed=72)
    tiny_fine_tune(folder / "full", own.base, seed=73)
    return folder


@pytest.fixture(scope="module")
def admin(own: TinyFamily, root: Path) -> Iterator[Served]:
    with serving(own.bundle, admin_key=ADMIN_KEY, experts_root=root, max_profile_prompts=20) as served:
        yield served


def register(served: Served, **body: Any) -> httpx.Response:
    return served.post("/admin/experts", body, headers=ADMIN, params={"wait": 60})


def text(served: Served, **body: Any) -> str:
    answer = served.complete(**{"max_tokens": 16, "temperature": 0, "ignore_eos": True, **body})
    return str(answer["choices"][0]["text"])


def test_an_expert_joins_is_routed_to_replaced_and_retired(admin: Served, own: TinyFamily) -> None:
    manifest = (own.bundle / "manifest.json").read_bytes()
    listed = admin.http.get("/admin/experts", headers=ADMIN).json()["data"]
    assert [expert["name"] for expert in listed] == ["alpha", "beta", "gamma"]

    joined = register(admin, name="colours", path="lora", rank=8, prompts=PROMPTS)
    assert joined.status_code == 201, joined.text
    body = joined.json()
    assert (body["name"], body["generation"], body["state"], body["routed"]) == ("colours", 1, "active", True)
    assert body["report"]["bytes"] > 0
    assert 0 <= body["report"]["relative_error"] < 1
    routing = admin.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]
    assert routing["gates"] == {"colours": 1.0}
    assert routing["router_generation"] == 2
    assert "colours" in [model["id"] for model in admin.http.get("/v1/models").json()["data"]]
    first = text(admin, model="colours")

    taken = register(admin, name="colours", path="deep/other")
    assert taken.status_code == 409
    assert error_of(taken)["code"] == "conflict"
    stale = register(admin, name="colours", path="deep/other", expected_generation=7)
    assert stale.status_code == 409
    assert error_of(stale)["param"] == "expected_generation"
    missing = register(admin, name="nobody", path="deep/other", expected_generation=1)
    assert missing.status_code == 409

    replaced = register(admin, name="colours", path="deep/other", expected_generation=1)
    assert replaced.status_code == 201, replaced.text
    assert replaced.json()["generation"] == 2
    assert replaced.json()["routed"] is True
    assert text(admin, model="colours") != first
    assert admin.complete(model="colours", max_tokens=1)["routing"]["generations"] == {"colours": 2}

    gone = admin.http.delete("/admin/experts/colours", headers=ADMIN)
    assert gone.status_code == 200
    assert gone.json()["state"] == "retired"
    assert admin.post("/v1/completions", {"model": "colours", "prompt": "a"}).status_code == 404
    assert admin.http.get("/admin/experts/colours", headers=ADMIN).status_code == 404
    assert admin.http.delete("/admin/experts/colours", headers=ADMIN).status_code == 404
    assert admin.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]["gates"].keys() <= {
        "alpha",
        "beta",
        "gamma",
    }
    assert (own.bundle / "manifest.json").read_bytes() == manifest


def test_what_was_registered_is_there_when_the_server_starts_again(root: Path, tmp_path: Path) -> None:
    family = tiny_family(tmp_path / "family")
    options: dict[str, Any] = {"admin_key": ADMIN_KEY, "experts_root": root}
    with serving(family.bundle, **options) as served:
        assert register(served, name="kept", path="lora", prompts=PROMPTS).status_code == 201
        assert register(served, name="alpha", path="deep/other", replace=True).status_code == 201
        assert served.http.delete("/admin/experts/beta", headers=ADMIN).status_code == 200
        before = {name: text(served, model=name) for name in ("alpha", "kept")}
        routing = served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]
    with serving(family.bundle, **options) as served:
        listed = served.http.get("/admin/experts", headers=ADMIN).json()["data"]
        assert [(one["name"], one["generation"]) for one in listed] == [
            ("alpha", 2),
            ("gamma", 1),
            ("kept", 1),
        ]
        assert {name: text(served, model=name) for name in ("alpha", "kept")} == before
        again = served.complete(prompt=PROMPTS[0], max_tokens=1)["routing"]
        assert (again["gates"], again["router_generation"]) == (
            routing["gates"],
            routing["router_generation"],
        )
    # The folder that `twinserve build` made is as it was.
    assert Bundle.open(family.bundle).expert_names() == ("alpha", "beta", "gamma")


def test_a_full_fine_tune_without_prompts_serves_by_name_only(admin: Served, root: Path) -> None:
    answer = register(admin, name="whole", path=str(root / "full"), energy=0.9)
    assert answer.status_code == 201, answer.text
    assert answer.json()["routed"] is False
    assert admin.complete(gates={"whole": 0.5, "alpha": 0.5}, max_tokens=2)["routing"]["generations"] == {
        "whole": 1,
        "alpha": 1,
    }
    assert admin.http.get("/admin/experts/whole", headers=ADMIN).json()["routed"] is False
    assert admin.http.delete("/admin/experts/whole", headers=ADMIN).status_code == 200


def test_requests_run_on_undisturbed_while_an_expert_joins_and_keep_their_generation(admin: Served) -> None:
    assert register(admin, name="moving", path="lora").status_code == 201
    expected = text(admin, model="moving", max_tokens=60)
    others = text(admin, model="beta", max_tokens=60)
    done = threading.Event()
    wrong: list[str] = []
    served = 0

    def keep_asking() -> None:
        nonlocal served
        with httpx.Client(base_url=admin.url, timeout=60) as http:
            while not done.is_set():
                for model, right in (("moving", expected), ("beta", others)):
                    body = {"model": model, "prompt": "Add 1 and 2.", "max_tokens": 60, "temperature": 0}
                    answer = http.post("/v1/completions", json={**body, "ignore_eos": True}).json()
                    generation = answer["routing"]["generations"][model]
                    if generation == 1 and answer["choices"][0]["text"] != right:
                        wrong.append(f"{model}@{generation}")
                    served += 1

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        replaced = register(admin, name="moving", path="deep/other", replace=True)
    finally:
        done.set()
        asking.join()
    assert replaced.status_code == 201, replaced.text
    assert served > 0
    assert not wrong
    assert admin.http.delete("/admin/experts/moving", headers=ADMIN).status_code == 200
    assert all(
        expert["leases"] == 0 for expert in admin.http.get("/admin/experts", headers=ADMIN).json()["data"]
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../x"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "shared"}, "name"),
        ({"name": "tiny"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"path": None}, "path"),
        ({"path": ""}, "path"),
        ({"path": "a\x00b"}, "path"),
        ({"path": "x" * 4097}, "path"),
        ({"path": "x" * 300}, "path"),
        ({"rank": 0}, "rank"),
        ({"rank": "8"}, "rank"),
        ({"energy": 1.5}, "energy"),
        ({"rank": 4, "energy": 0.5}, None),
        ({"prompts": ["a"]}, "prompts"),
        ({"prompts": [""] * 9}, "prompts[0]"),
        ({"prompts": ["a"] * 21}, "prompts"),
        ({"expected_generation": 0}, "expected_generation"),
        ({"url": "http://127.0.0.1/"}, "url"),
        ({"upload": "upload-1"}, "upload"),
        ({"path": ["lora"]}, "path"),
        ({"path": {"a": 1}}, "path"),
        ({"name": 7}, "name"),
        ({"name": "名前"}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": "a."}, "name"),
        ({"name": "a@1"}, "name"),
        ({"prompts": "red"}, "prompts"),
        ({"prompts": ["a"] * 100_000}, "prompts"),
        ({"prompts": [["a"]] * 9}, "prompts[0]"),
        ({"expected_generation": 2**31}, "expected_generation"),
        ({"expected_generation": "1"}, "expected_generation"),
        ({"expected_generation": 1.0}, "expected_generation"),
        ({"replace": "yes"}, "replace"),
        ({"activate": 1}, "activate"),
        ({"canary_prompts": {}}, "canary_prompts"),
        ({"canary_prompts": [{"prompt": "a"}]}, "canary_prompts[0].expected"),
        ({"canary_prompts": [{"prompt": "a", "expected": ""}]}, "canary_prompts[0].expected"),
        ({"canary_prompts": [{"prompt": "a", "expected": "b", "match": "regex"}]}, "canary_prompts[0].match"),
        ({"canary_prompts": [{"prompt": "a", "expected": "b"}] * 65}, "canary_prompts"),
        ({"canary_min_score": 1.5}, "canary_min_score"),
        ({"trial": {"kind": "canary"}}, "trial.percent"),
        ({"trial": {"kind": "canary", "percent": 0}}, "trial.percent"),
        ({"trial": {"kind": "half", "percent": 1}}, "trial.kind"),
        ({"trial": "canary"}, "trial"),
        ({"signature": ""}, "signature"),
        ({"signature": "x" * 1025}, "signature"),
        ({"wait": 5}, "wait"),
    ],
)
def test_a_bad_registration_is_refused_by_field(
    admin: Served, change: dict[str, Any], param: str | None
) -> None:
    answer = register(admin, **{"name": "bad", "path": "lora", **change})
    assert answer.status_code in (400, 422), answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    "path", ["..", "../..", "/", "/etc", ".", "deep/../../x", "link-out", "inner-link", "~"]
)
def test_a_path_outside_the_root_is_forbidden(admin: Served, root: Path, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "link-out").unlink(missing_ok=True)
    (root / "link-out").symlink_to(outside)
    shutil.copytree(root / "lora", root / "inner-link", dirs_exist_ok=True)
    weights = root / "inner-link" / "adapter_model.safetensors"
    shutil.copy(root / "lora" / weights.name, outside / weights.name)
    weights.unlink()
    weights.symlink_to(outside / weights.name)
    answer = register(admin, name="bad", path=path)
    if path == "~":  # an ordinary name that does not exist, not somebody's home
        assert answer.status_code == 422
        return
    assert answer.status_code == 403
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("path_not_allowed", "path")
    assert "TWINSERVE_EXPERTS_ROOT" in error["message"]


def broken(kind: str, source: Path, target: Path, base: Path) -> str:
    """Make a broken checkpoint at `target`; returns what the refusal must name."""
    if kind == "architecture":
        tiny_model("gpt2", target)
        return "GPT2"
    shutil.copytree(source, target)
    weights = target / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return weights.name
    if kind == "corrupt header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        return weights.name
    if kind == "pickle":
        torch.save(load_file(weights), target / "adapter_model.bin")
        weights.unlink()
        return "adapter_model.bin"
    if kind == "missing weights":
        weights.unlink()
        return "broken"
    if kind == "bad config":
        (target / "adapter_config.json").write_text("{")
        return "adapter_config.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if kind == "nan":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 1)
    save_file(tensors, weights)
    return "q_proj" if "q_proj" in name else name.split(".")[-3]


@pytest.mark.parametrize(
    "kind",
    [
        "architecture",
        "truncated",
        "corrupt header",
        "pickle",
        "missing weights",
        "bad config",
        "nan",
        "shape",
    ],
)
def test_a_checkpoint_that_cannot_become_an_expert_is_rejected_with_the_reason(
    admin: Served, own: TinyFamily, root: Path, kind: str
) -> None:
    folder = root / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    named = broken(kind, root / "lora", folder, own.base)
    answer = register(admin, name="bad", path="broken")
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert error["code"] == "expert_rejected"
    assert named in error["message"], error["message"]
    assert "bad" not in {
        one["name"] for one in admin.http.get("/admin/experts", headers=ADMIN).json()["data"]
    }
    assert admin.post("/v1/completions", {"model": "bad", "prompt": "a"}).status_code == 404


def test_a_pipe_in_the_folder_does_not_block_the_server(admin: Served, root: Path) -> None:
    folder = root / "pipe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    os.mkfifo(folder / "model.safetensors")
    answer = register(admin, name="bad", path="pipe")
    assert answer.status_code == 422
    assert "model.safetensors" in error_of(answer)["message"]


def test_without_a_root_nothing_can_be_registered(family: TinyFamily) -> None:
    with serving(family.bundle, admin_key=ADMIN_KEY) as served:
        answer = register(served, name="new", path="lora")
        assert answer.status_code == 403
        assert "TWINSERVE_EXPERTS_ROOT" in error_of(answer)["message"]
