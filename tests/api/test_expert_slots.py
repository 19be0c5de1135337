"""More experts than places on the device, and weights made for gates that are alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.registrar import open_registry
from service.settings import Settings
from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.api.operators import Operator, blob_of
from tests.fixtures.tiny import TinyFamily, tiny_lora

NAMES = ("alpha", "beta", "gamma")
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def one_slot(family: TinyFamily) -> Iterator[Served]:
    with serving(family.bundle, max_experts=1, admin_key=ADMIN_KEY) as served:
        yield served


def text(server: Served, **body: Any) -> str:
    return str(server.complete(**GREEDY, **body)["choices"][0]["text"])


def test_every_expert_answers_as_if_it_were_always_there(server: Served, one_slot: Served) -> None:
    before = {name: one_slot.metric(f"twinserve_expert_{name}_total") for name in ("loads", "evictions")}
    for name in (*NAMES, *NAMES):
        assert text(one_slot, model=name) == text(server, model=name)
    for name, count in before.items():
        assert one_slot.metric(f"twinserve_expert_{name}_total") > count
    assert one_slot.metric("twinserve_experts_registered") == 3
    assert one_slot.metric("twinserve_experts_resident") == 1
    assert one_slot.metric("twinserve_expert_slot_misses_total") > 0


def test_who_needs_more_experts_than_there_are_places_is_served_too(server: Served, one_slot: Served) -> None:
    gates = {"alpha": 0.5, "beta": 0.25, "gamma": 0.25}
    assert text(one_slot, gates=gates) == text(server, gates=gates)


def test_an_operator_sees_which_experts_are_on_the_device(one_slot: Served) -> None:
    text(one_slot, model="beta")
    listed = one_slot.http.get("/admin/experts", headers={"X-API-Key": ADMIN_KEY}).json()["data"]
    assert [one["name"] for one in listed] == list(NAMES)
    assert [one["name"] for one in listed if one["resident"]] == ["beta"]


def test_a_pinned_expert_stays(family: TinyFamily) -> None:
    with serving(family.bundle, max_experts=2, pinned_experts="gamma", admin_key=ADMIN_KEY) as served:
        for name in ("alpha", "beta", "alpha"):
            text(served, model=name)
        gamma = served.http.get("/admin/experts/gamma", headers={"X-API-Key": ADMIN_KEY}).json()
        assert gamma["resident"]


def test_an_expert_that_cannot_be_loaded_is_503_and_nobody_answers_in_its_place(
    family: TinyFamily, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    open_registry(Settings(bundle=family.bundle, state_dir=state)).close()
    weights = blob_of(state, "gamma", 1)
    weights.chmod(0o600)
    weights.write_bytes(bytes(weights.stat().st_size))
    with serving(family.bundle, max_experts=1, state_dir=state) as served:
        for stream in (False, True):
            body = {"model": "gamma", "prompt": "a", "stream": stream}
            answer = served.post("/v1/completions", body)
            assert answer.status_code == 503
            error = error_of(answer)
            assert error["code"] == "expert_unavailable"
            assert str(tmp_path) not in error["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert text(served, model="alpha")
        gauges = served.runtime.gauges
        assert eventually(lambda: gauges().running == gauges().waiting == gauges().kv_blocks_used == 0)


def test_merged_weights_answer_as_factors_do_and_the_answer_says_so(
    server: Served, family: TinyFamily
) -> None:
    with serving(family.bundle, mix_mode="merged") as served:
        if served.runtime.runtime._engine.merged is None:
            pytest.skip("no compiler: nothing is merged here")
        expected = text(server, model="beta")

        def merged() -> bool:
            answer = served.complete(**GREEDY, model="beta")
            assert answer["choices"][0]["text"] == expected
            return bool(answer["routing"]["mode"] == "merged")

        assert eventually(merged)
        assert served.metric("twinserve_merged_weight_bytes") > 0
        assert served.metric('twinserve_steps_total{mode="merged"}') > 0
        assert served.complete(**GREEDY, model="shared")["routing"]["mode"] == "shared"


def test_an_expert_that_joins_where_places_are_few_is_loaded_when_it_is_named(
    family: TinyFamily, tmp_path: Path
) -> None:
    tiny_lora(tmp_path / "root" / "one", family.base, rank=4, seed=71)
    options = {"experts_root": tmp_path / "root", "state_dir": tmp_path / "state", "admin_key": ADMIN_KEY}
    with serving(family.bundle, **options) as served:
        Operator(served).registered(name="alpha", path="one", replace=True)
        expected = text(served, model="alpha")
    with serving(family.bundle, **options, max_experts=1) as served:
        admin = Operator(served)
        assert text(served, model="alpha") == expected
        admin.registered(name="new", path="one")
        assert text(served, model="beta") != text(served, model="new")
        assert text(served, model="alpha") == expected
        assert admin.post("/experts/alpha/rollback", {}).status_code == 200
        assert text(served, model="alpha") != expected
        assert served.metric("twinserve_experts_resident") == 1
