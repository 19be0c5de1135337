"""n choices for one prompt: it is computed once, and every choice is what it would be alone."""

import pytest

from service.core import Failed, Finished, SamplingParams
from service.engine.roster import StepResult
from service.errors import ShuttingDownError
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, prompt_ids, random_expert
from tests.model.routers import random_router

GATES = {"e0": 0.75, "e1": 0.25}
PROMPT = prompt_ids(1, 41, VOCABULARY)


def _sampling(seed: int, tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)


@pytest.fixture(scope="module")
def experts(llama, plain_llama):
    return [random_expert(plain_llama, f"e{i}", seed=i) for i in range(2)]


@pytest.fixture(scope="module")
def alone(llama, experts):
    """Seed → tokens of a request that runs alone."""
    harness = Harness(llama, experts, prefix_cache=False, native="off")
    for seed in range(6):
        harness.submit(f"r{seed}", PROMPT, GATES, _sampling(seed))
        harness.run()
    return {seed: harness.tokens(f"r{seed}") for seed in range(6)}


def _submit(harness: Harness, count: int, gates=GATES, **more) -> None:
    for i in range(count):
        harness.submit(f"c{i}", PROMPT, gates, _sampling(i), leader="c0" if i else None, **more)


@pytest.mark.parametrize("step_tokens", [64, 16])
def test_the_prompt_is_computed_once_and_each_choice_equals_its_lone_run(
    llama, experts, alone, native, step_tokens
):
    harness = Harness(llama, experts, native=native, budget=Budget(step_tokens, 16))
    _submit(harness, 6)
    harness.run()
    assert harness.prefilled == 41 + 5 * (41 - 32)
    kv = harness.engine.scheduler.kv
    assert (kv.queries, kv.hits) == (6 * 41, 5 * 32)
    for i in range(6):
        assert harness.tokens(f"c{i}") == alone[i]
        assert harness.finished(f"c{i}").usage.cached_tokens == (32 if i else 0)
    assert len({tuple(harness.tokens(f"c{i}")) for i in range(6)}) > 1
    harness.assert_idle()


def test_choices_share_the_blocks_of_their_prompt(llama, experts):
    harness = Harness(llama, experts)
    _submit(harness, 6)
    while len(harness.engine.scheduler.running) < 6:
        harness.step()
    # Two whole blocks together, and one or two for each choice's own end of the prompt and answer.
    assert harness.engine.scheduler.kv.used_blocks <= 2 + 6 * 2
    harness.run()
    harness.assert_idle()


@pytest.mark.parametrize("single_pass", [False, True])
def test_followers_take_over_the_leaders_gates_and_route_once(llama, experts, native, single_pass):
    router = random_router(llama, ["e0", "e1"], layer=1)
    harness = Harness(
        llama, experts, native=native, router=router, single_pass=single_pass, budget=Budget(64, 64)
    )
    _submit(harness, 4, gates=None)
    harness.run()
    outcomes = [harness.finished(f"c{i}").routing for i in range(4)]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0].router_generation == router.generation
    assert sum(stats.routed_requests for stats in harness.stats) == (0 if single_pass else 1)
    assert harness.prefilled == 41 + 3 * (41 - 32)
    lone = Harness(
        llama, experts, native=native, router=router, single_pass=single_pass, budget=Budget(64, 64)
    )
    for i in range(4):
        lone.submit(f"c{i}", PROMPT, None, _sampling(i))
        lone.run()
        assert harness.tokens(f"c{i}") == lone.tokens(f"c{i}")
    harness.assert_idle()


@pytest.mark.parametrize("single_pass", [False, True])
def test_a_leader_that_is_cancelled_before_it_is_routed_leaves_its_followers_to_themselves(
    llama, experts, single_pass
):
    router = random_router(llama, ["e0", "e1"], layer=1)
    harness = Harness(llama, experts, router=router, single_pass=single_pass, budget=Budget(64, 64))
    _submit(harness, 4, gates=None)
    harness.cancel("c0")
    harness.run()
    assert harness.finished("c0").reason == "cancelled"
    gates = [harness.finished(f"c{i}").routing.gates for i in range(1, 4)]
    assert gates[0]
    assert gates.count(gates[0]) == 3
    harness.assert_idle()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_leader_that_is_cancelled_in_its_prefill_is_succeeded_by_a_follower(
    llama, experts, alone, steps, native
):
    harness = Harness(llama, experts, budget=Budget(16, 16), native=native)
    _submit(harness, 4)
    for _ in range(steps):
        harness.step()
    assert harness.engine.scheduler.running[0].in_prefill
    harness.cancel("c0")
    harness.run()
    for i in range(1, 4):
        assert harness.tokens(f"c{i}") == alone[i]
    # Only one of them computes what the leader left undone.
    assert harness.prefilled <= 16 * steps + 41 + 2 * (41 - 32)
    harness.assert_idle()


@pytest.mark.parametrize("gates", [GATES, None], ids=["named", "routed"])
@pytest.mark.parametrize("single_pass", [False, True])
def test_a_leader_that_fails_takes_no_follower_with_it(llama, experts, gates, single_pass, monkeypatch):
    router = random_router(llama, ["e0", "e1"], layer=1)
    harness = Harness(llama, experts, router=router, single_pass=single_pass, budget=Budget(64, 64))
    _submit(harness, 4, gates=gates)
    forward = harness.model.forward

    def explode(batch):
        if harness.engine._roster.get("c0") is not None and batch.layout.chunks:
            raise RuntimeError("a kernel gave up")
        return forward(batch)

    monkeypatch.setattr(harness.model, "forward", explode)
    harness.run()
    assert isinstance(harness.terminal("c0"), Failed)
    for i in range(1, 4):
        assert isinstance(harness.terminal(f"c{i}"), Finished)
        assert len(harness.tokens(f"c{i}")) == 12
    harness.assert_idle()


def test_followers_whose_deadline_passes_end_without_their_leader(llama, experts):
    router = random_router(llama, ["e0", "e1"], layer=1)
    harness = Harness(llama, experts, router=router)
    harness.submit("c0", PROMPT, None, _sampling(0))
    harness.submit("c1", PROMPT, None, _sampling(1), leader="c0", deadline=0.0)
    harness.submit("c2", PROMPT, None, _sampling(2), leader="c0")
    harness.run()
    assert harness.terminal("c1").error.code == "deadline_exceeded"
    assert len(harness.tokens("c0")) == len(harness.tokens("c2")) == 12
    harness.assert_idle()


def test_a_leader_that_is_gone_or_was_never_there_is_no_leader(llama, experts, alone):
    harness = Harness(llama, experts)
    harness.submit("c1", PROMPT, GATES, _sampling(1), leader="nobody")
    harness.run()
    harness.submit("c2", PROMPT, GATES, _sampling(2), leader="c1")
    harness.run()
    assert harness.tokens("c1") == alone[1]
    assert harness.tokens("c2") == alone[2]
    harness.assert_idle()


def test_all_of_a_party_can_be_ended_at_once(llama, experts):
    harness = Harness(llama, experts, router=random_router(llama, ["e0", "e1"], layer=1))
    _submit(harness, 4, gates=None)
    result = StepResult()
    harness.engine.fail_all(ShuttingDownError("enough"), result)
    harness._collect(result)
    assert all(isinstance(harness.terminal(f"c{i}"), Failed) for i in range(4))
    harness.assert_idle()
