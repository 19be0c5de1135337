"""Exports over HTTP: what a client unpacks is the expert, and nothing of it stays on the server."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.registry import prepare_expert
from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.fixtures.tiny import tiny_family
from tests.model.harness import materialised

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Bundle]]:
    family = tiny_family(tmp_path_factory.mktemp("exports"), router=False)
    with serving(family.bundle, admin_key=ADMIN_KEY) as one:
        yield one, Bundle.open(family.bundle)


def _unpacked(answer: httpx.Response, folder: Path) -> Path:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert len(archive.getmembers()) == len({member.name for member in archive.getmembers()})
        archive.extractall(folder, filter="data")
    [top] = folder.iterdir()
    assert f'filename="{top.name}.tar"' in answer.headers["content-disposition"]
    return top


def _left(bundle: Bundle) -> list[Path]:
    root = bundle.path / "registry" / "twinserve-exports"
    return [path for path in root.rglob("*") if path.is_file()] if root.exists() else []


@pytest.mark.parametrize("form", ["peft", "gguf", "expert"])
def test_an_expert_arrives_as_it_is_served(form: str, served: tuple[Served, Bundle], tmp_path: Path) -> None:
    server, bundle = served
    answer = server.http.get("/admin/experts/beta/export", params={"format": form}, headers=ADMIN)
    top = _unpacked(answer, tmp_path)
    assert top.name == f"beta-1-{form}"
    again = prepare_expert(bundle, "again", top)
    for name, factors in bundle.expert("beta").factors.items():
        assert torch.equal(again.factors[name].low_rank().up, factors.low_rank().up)
        assert torch.equal(again.factors[name].Vh, factors.Vh)
    assert eventually(lambda: not _left(bundle))


def test_a_model_arrives_with_its_gates_merged_in(served: tuple[Served, Bundle], tmp_path: Path) -> None:
    server, bundle = served
    answer = server.http.get("/admin/export", params={"gates": "alpha:0.5,beta@1:0.25"}, headers=ADMIN)
    top = _unpacked(answer, tmp_path)
    merged = dict(AutoModelForCausalLM.from_pretrained(top, dtype=torch.float32).named_parameters())
    mix = [(bundle.expert("alpha"), 0.5), (bundle.expert("beta"), 0.25)]
    for name, parameter in materialised(bundle.shared_path, mix).named_parameters():
        torch.testing.assert_close(merged[name], parameter, atol=1e-6, rtol=1e-6)
    assert eventually(lambda: not _left(bundle))


def test_a_client_that_hangs_up_leaves_nothing_behind(served: tuple[Served, Bundle]) -> None:
    server, bundle = served
    for _ in range(3):
        with (
            httpx.Client(base_url=server.url, headers=ADMIN) as client,
            client.stream("GET", "/admin/export", params={"gates": ""}) as answer,
        ):
            next(answer.iter_raw(512))
    assert eventually(lambda: not _left(bundle))
    # and the next one has its turn at once
    assert server.http.get("/admin/export", headers=ADMIN).status_code == 200


def test_exports_are_audited(served: tuple[Served, Bundle]) -> None:
    server, _ = served
    assert (
        server.http.get("/admin/experts/alpha/export", params={"format": "peft"}, headers=ADMIN).status_code
        == 200
    )
    newest = server.http.get("/admin/audit", params={"limit": 1}, headers=ADMIN).json()["data"][0]
    assert (newest["action"], newest["target"], newest["result"]) == ("export", "alpha@1", "ok")
    assert newest["detail"] == {"format": "peft"}


@pytest.mark.parametrize(
    ("path", "status", "code", "param"),
    [
        ("/admin/experts/alpha/export", 400, "invalid_request", "format"),
        ("/admin/experts/alpha/export?format=zip", 400, "invalid_request", "format"),
        ("/admin/experts/nobody/export?format=peft", 404, "expert_not_found", None),
        ("/admin/experts/alpha/export?format=peft&generation=9", 404, "record_not_found", None),
        ("/admin/export?gates=alpha", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha:much", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha:nan", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha@x:1", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha:1,alpha:1", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha:1,alpha@1:1", 400, "invalid_request", "gates"),
        ("/admin/export?gates=alpha:99", 400, "limit_exceeded", "gates"),
        ("/admin/export?gates=" + ",".join(f"a{i}:1" for i in range(65)), 400, "limit_exceeded", "gates"),
        ("/admin/export?gates=nobody:1", 404, "expert_not_found", "gates"),
        ("/admin/export?format=onnx", 400, "invalid_request", "format"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    path: str, status: int, code: str, param: str | None, served: tuple[Served, Bundle]
) -> None:
    server, _ = served
    answer = server.http.get(path, headers=ADMIN)
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)


def test_exports_need_the_admin_key(served: tuple[Served, Bundle]) -> None:
    server, _ = served
    for path in ("/admin/export", "/admin/experts/alpha/export?format=peft"):
        assert server.http.get(path).status_code == 401


def test_a_form_that_cannot_hold_the_architecture_says_which_can(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, architecture="gpt2", experts=("alpha",), router=False)
    with serving(family.bundle, admin_key=ADMIN_KEY) as server:
        answer = server.http.get("/admin/experts/alpha/export", params={"format": "gguf"}, headers=ADMIN)
        assert answer.status_code == 422
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("export_rejected", "format")
        assert "export as peft" in error["message"]
