"""vLLM's ways to load and unload adapters while the server runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, serving
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora, tiny_model

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose bundle these tests change."""
    return tiny_family(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def root(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "one", own.base, rank=4, seed=81)
    tiny_lora(folder / "two", own.base, rank=2, seed=82)
    tiny_model("gpt2", folder / "other")
    return folder


@pytest.fixture(scope="module")
def served(own: TinyFamily, root: Path) -> Iterator[Served]:
    with serving(own.bundle, admin_key=ADMIN_KEY, experts_root=root) as server:
        yield server


def load(served: Served, **body: Any) -> httpx.Response:
    return served.post("/v1/load_lora_adapter", body, headers=ADMIN)


def unload(served: Served, **body: Any) -> httpx.Response:
    return served.post("/v1/unload_lora_adapter", body, headers=ADMIN)


def experts(served: Served) -> set[str]:
    """What operators are told of."""
    return {one["name"] for one in served.http.get("/admin/experts", headers=ADMIN).json()["data"]}


def text(served: Served, model: str) -> str:
    answer = served.complete(model=model, max_tokens=12, temperature=0, ignore_eos=True)
    return str(answer["choices"][0]["text"])


def test_an_adapter_is_loaded_replaced_and_unloaded(served: Served, root: Path) -> None:
    loaded = load(served, lora_name="sql", lora_path="one")
    assert loaded.status_code == 200, loaded.text
    assert loaded.text == "Success: LoRA adapter 'sql' added successfully."
    assert loaded.headers["content-type"].startswith("text/plain")
    assert "sql" in [model["id"] for model in served.http.get("/v1/models").json()["data"]]
    assert "sql" in experts(served)
    first = text(served, "sql")

    again = load(served, lora_name="sql", lora_path="two")
    assert again.status_code == 400
    assert "load_inplace" in error_of(again)["message"]
    assert error_of(again)["param"] == "lora_name"
    assert text(served, "sql") == first

    replaced = load(served, lora_name="sql", lora_path=str(root / "two"), load_inplace=True)
    assert replaced.status_code == 200
    assert text(served, "sql") != first
    assert served.complete(model="sql", max_tokens=1)["routing"]["generations"] == {"sql": 2}

    gone = unload(served, lora_name="sql", lora_int_id=1)
    assert gone.status_code == 200
    assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
    assert served.post("/v1/completions", {"model": "sql", "prompt": "a"}).status_code == 404
    assert "sql" not in experts(served)
    missing = unload(served, lora_name="sql")
    assert missing.status_code == 404
    assert error_of(missing)["param"] == "lora_name"


def test_a_new_adapter_may_be_loaded_in_place(served: Served) -> None:
    assert load(served, lora_name="new", lora_path="one", load_inplace=True).status_code == 200
    assert unload(served, lora_name="new").status_code == 200


def test_loading_is_a_job_of_the_operator_that_asked(served: Served) -> None:
    assert load(served, lora_name="told", lora_path="one").status_code == 200
    [job] = served.http.get("/admin/jobs", params={"name": "told"}, headers=ADMIN).json()["data"]
    assert (job["kind"], job["state"]) == ("register", "succeeded")
    entries = served.http.get("/admin/audit", params={"target": "told"}, headers=ADMIN).json()["data"]
    assert "127.0.0.1" in {entry["address"] for entry in entries}
    assert unload(served, lora_name="told").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "bad"}, 400, "lora_path"),
        ({"lora_name": "", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a/b", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "../x", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "tiny", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "shared", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "alpha", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "bad", "lora_path": ""}, 400, "lora_path"),
        ({"lora_name": "bad", "lora_path": "a\x00b"}, 400, "lora_path"),
        ({"lora_name": "bad", "lora_path": "nowhere"}, 404, "lora_path"),
        ({"lora_name": "bad", "lora_path": ".."}, 403, "lora_path"),
        ({"lora_name": "bad", "lora_path": "/etc"}, 403, "lora_path"),
        ({"lora_name": "bad", "lora_path": "other"}, 422, "lora_path"),
        ({"lora_name": "bad", "lora_path": "one", "load_inplace": "yes"}, 400, "load_inplace"),
        ({"lora_name": "bad", "lora_path": "one", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        ({"lora_name": "bad", "lora_path": "one", "base_model_name": "x"}, 400, "base_model_name"),
    ],
)
def test_a_bad_load_is_refused_by_field(
    served: Served, body: dict[str, Any], status: int, param: str
) -> None:
    answer = load(served, **body)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"] == param
    assert "bad" not in served.runtime.expert_names()


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_only_the_admin_key_opens_them(served: Served, family: TinyFamily, path: str) -> None:
    body = {"lora_name": "alpha", "lora_path": "one"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert served.post(path, body, headers=headers).status_code == 401
    assert "alpha" in served.runtime.expert_names()


def test_without_an_admin_key_they_are_off(family: TinyFamily) -> None:
    with serving(family.bundle, api_keys=("key",)) as open_one:
        answer = open_one.post(
            "/v1/load_lora_adapter",
            {"lora_name": "x", "lora_path": "one"},
            headers={"Authorization": "Bearer key"},
        )
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "admin_disabled"
