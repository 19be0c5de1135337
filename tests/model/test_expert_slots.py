"""More registered experts than slots: every answer is right, whoever had to make room for it."""

import itertools
import time

import pytest

from service.core import ExpertKey, Failed, SamplingParams
from service.errors import ExpertUnavailableError
from service.gating.slots import SlotPool
from tests.fixtures.executors import HeldExecutor
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router

NAMES = [f"e{i}" for i in range(6)]
TWELVE = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def experts(plain_llama):
    return {
        name: random_expert(plain_llama, name, seed=i, ranks=[(3,), (5, 2), (1,)][i % 3])
        for i, name in enumerate(NAMES)
    }


def _harness(llama, experts, pool=None, **more) -> Harness:
    harness = Harness(llama, pool=SlotPool(max_experts=2) if pool is None else pool, **more)
    for expert in experts.values():
        harness.register(expert)
    return harness


def _expected(llama, experts, gates, prompt, tokens: int = 12) -> list[int]:
    return reference(materialised(llama, [(experts[n], g) for n, g in gates.items()]), prompt, tokens)


@pytest.mark.parametrize("prefetched", [False, True], ids=["on demand", "beforehand"])
def test_requests_for_all_of_them_are_all_answered_right(llama, experts, prefetched, native):
    harness = Harness(
        llama, list(experts.values()) if prefetched else [], pool=SlotPool(max_experts=2), native=native
    )
    for expert in experts.values():
        harness.register(expert)
    mixes = [{name: 1.0} for name in NAMES] + [
        {first: 0.5, second: 0.25} for first, second in itertools.pairwise(NAMES)
    ]
    prompts = [prompt_ids(i, 8 + 2 * i, VOCABULARY) for i in range(len(mixes))]
    for i, (mix, prompt) in enumerate(zip(mixes, prompts, strict=True)):
        harness.submit(f"r{i}", prompt, mix, TWELVE)
        if i % 3 == 0:
            harness.step()
    most = 0
    while harness.engine.busy:
        harness.step()
        most = max(most, harness.model.bank.resident_count)
    assert most == 2
    for i, (mix, prompt) in enumerate(zip(mixes, prompts, strict=True)):
        assert harness.tokens(f"r{i}") == _expected(llama, experts, mix, prompt), mix
    gauges = harness.engine.gauges(alive=True)
    assert gauges.expert_evictions > 0
    assert gauges.expert_loads >= 4
    assert (gauges.experts_registered, gauges.experts_resident) == (6, 2)
    harness.assert_idle()


def test_a_mix_of_more_experts_than_slots_is_answered_all_the_same(llama, experts):
    harness = _harness(llama, experts)
    gates = dict.fromkeys(NAMES[:4], 0.25)
    prompt = prompt_ids(1, 20, VOCABULARY)
    harness.submit("wide", prompt, gates, TWELVE)
    for name in NAMES:
        harness.submit(name, prompt, {name: 1.0}, TWELVE)
    harness.run()
    assert harness.tokens("wide") == _expected(llama, experts, gates, prompt)
    for name in NAMES:
        assert harness.tokens(name) == _expected(llama, experts, {name: 1.0}, prompt)
    harness.step()
    assert harness.model.bank.resident_count <= 2
    harness.assert_idle()


def test_slots_in_bytes(llama, experts):
    sizes = [Harness(llama).model.bank.prepare(expert).nbytes for expert in experts.values()]
    harness = _harness(llama, experts, SlotPool(max_bytes=max(sizes) + min(sizes)))
    for name in NAMES:
        harness.submit(name, prompt_ids(1, 20, VOCABULARY), {name: 1.0}, TWELVE)
    while harness.engine.busy:
        harness.step()
        assert harness.engine.residency.pool.used_bytes <= max(sizes) + min(sizes)
    for name in NAMES:
        assert harness.tokens(name) == _expected(llama, experts, {name: 1.0}, prompt_ids(1, 20, VOCABULARY))
    harness.assert_idle()


def test_a_load_that_fails_ends_its_own_requests_and_works_again_later(llama, experts, monkeypatch):
    harness = _harness(llama, experts)
    harness.source.broken.add(ExpertKey("e1", 1))
    prompt = prompt_ids(1, 20, VOCABULARY)
    for name in NAMES[:4]:
        harness.submit(name, prompt, {name: 1.0}, TWELVE)
    harness.submit("mixed", prompt, {"e0": 0.5, "e1": 0.5}, TWELVE)
    harness.run()
    for name in ("e1", "mixed"):
        last = harness.terminal(name)
        assert isinstance(last, Failed)
        assert isinstance(last.error, ExpertUnavailableError)
        assert "'e1'" in last.error.message
        assert last.error.retry_after is not None
        assert 0 < last.error.retry_after <= 1
        # What the disk says is in the log; the client learns no paths.
        assert "disk" not in last.error.message
    for name in ("e0", "e2", "e3"):
        assert harness.tokens(name) == _expected(llama, experts, {name: 1.0}, prompt)
    harness.source.broken.clear()
    harness.submit("too soon", prompt, {"e1": 1.0}, TWELVE)
    harness.run()
    assert isinstance(harness.terminal("too soon").error, ExpertUnavailableError)
    monkeypatch.setattr(harness.engine.residency.loader, "_clock", lambda: time.monotonic() + 10)
    harness.submit("later", prompt, {"e1": 1.0}, TWELVE)
    harness.run()
    assert harness.tokens("later") == _expected(llama, experts, {"e1": 1.0}, prompt)
    harness.assert_idle()


def test_requests_wait_for_a_slow_load_while_others_go_on(llama, experts):
    executor = HeldExecutor()
    harness = _harness(llama, experts, executor=executor)
    prompt = prompt_ids(1, 20, VOCABULARY)
    harness.submit("waits", prompt, {"e0": 1.0}, TWELVE)
    harness.submit("goes on", prompt, {}, TWELVE)
    while harness.engine._roster.get("goes on"):
        harness.step()
    assert not harness.tokens("waits")
    harness.step()
    assert harness.engine.stalled
    executor.run()
    harness.run()
    assert harness.tokens("waits") == _expected(llama, experts, {"e0": 1.0}, prompt)
    harness.assert_idle()


def test_a_request_that_is_cancelled_while_its_expert_loads_leaves_nothing(llama, experts):
    executor = HeldExecutor()
    harness = _harness(llama, experts, executor=executor)
    for name in NAMES[:3]:
        harness.submit(name, prompt_ids(1, 20, VOCABULARY), {name: 1.0}, TWELVE)
    harness.step()
    for name in NAMES[:3]:
        harness.cancel(name)
    assert not harness.engine.busy
    executor.run()
    # Whatever was under way is settled by the next request.
    harness.submit("next", prompt_ids(1, 20, VOCABULARY), {"e5": 1.0}, TWELVE)
    for _ in range(200):
        if not harness.engine.busy:
            break
        harness.step()
        executor.run()
    assert harness.tokens("next") == _expected(llama, experts, {"e5": 1.0}, prompt_ids(1, 20, VOCABULARY))
    harness.assert_idle()


def test_an_expert_that_is_replaced_while_it_loads_is_the_new_one(llama, plain_llama, experts):
    executor = HeldExecutor()
    harness = _harness(llama, experts, executor=executor)
    prompt = prompt_ids(1, 20, VOCABULARY)
    harness.submit("old", prompt, {"e0": 1.0}, TWELVE)
    harness.step()
    second = random_expert(plain_llama, "e0", seed=91, generation=2)
    harness.publish(second)
    harness.submit("new", prompt, {"e0": 1.0}, TWELVE)
    for _ in range(200):
        if not harness.engine.busy:
            break
        harness.step()
        executor.run()
    assert harness.tokens("old") == _expected(llama, experts, {"e0": 1.0}, prompt)
    assert harness.tokens("new") == reference(materialised(llama, [(second, 1.0)]), prompt, 12)
    harness.assert_idle()


@pytest.mark.parametrize("single_pass", [False, True])
def test_routed_requests_fetch_what_the_router_chose(llama, experts, single_pass):
    router = random_router(llama, NAMES, layer=1)
    harness = _harness(llama, experts, router=router, single_pass=single_pass)
    prompts = [prompt_ids(i, 10 + i, VOCABULARY) for i in range(8)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, None, TWELVE)
    harness.run()
    # With slots for a few, gates must be known before a prompt begins: nobody is routed in its own prefill.
    assert sum(stats.routed_requests for stats in harness.stats) == 8
    for i, prompt in enumerate(prompts):
        gates = harness.finished(f"r{i}").routing.gates
        assert harness.tokens(f"r{i}") == _expected(llama, experts, gates, prompt)
    harness.assert_idle()


def test_preempted_requests_get_their_experts_back(llama, experts, native):
    harness = _harness(llama, experts, kv_bytes=0, max_tokens=100, native=native)
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = [prompt_ids(i, 10 + 3 * i, VOCABULARY) for i in range(8)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, {NAMES[i % 3]: 1.0}, sampling)
    harness.run()
    assert harness.preemptions > 0
    assert harness.engine.gauges(alive=True).expert_evictions > 0
    for i, prompt in enumerate(prompts):
        assert harness.tokens(f"r{i}") == _expected(llama, experts, {NAMES[i % 3]: 1.0}, prompt, 40)
    harness.assert_idle()
