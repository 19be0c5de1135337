"""A deadline that passes ends its request, wherever it is, with one error, and leaves nothing behind."""

import time
from types import SimpleNamespace

import pytest

from service.core import Failed, Finished, SamplingParams
from service.engine import engine as engine_module
from service.engine import intake as intake_module
from service.errors import DeadlineExceededError
from service.gating.slots import SlotPool
from service.scheduler.policy import Budget
from tests.fixtures.executors import HeldExecutor
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router

LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
PROMPT = prompt_ids(1, 60, VOCABULARY)


@pytest.fixture
def clock(monkeypatch):
    """The engine's time, under the test's hand."""
    clock = SimpleNamespace(ahead=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    for module in (engine_module, intake_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def expert(plain_llama):
    return random_expert(plain_llama, "e", seed=1)


def _late(harness: Harness, *names: str) -> None:
    for name in names:
        last = harness.terminal(name)
        assert isinstance(last, Failed)
        assert isinstance(last.error, DeadlineExceededError)
        assert last.error.param == "timeout"


def _soon() -> float:
    return time.monotonic() + 1000


def test_before_the_first_step(llama, expert, clock):
    harness = Harness(llama, [expert], router=random_router(llama, ["e"], layer=1))
    harness.submit("routed", PROMPT, None, LONG, deadline=0.0)
    harness.submit("named", PROMPT, {"e": 1.0}, LONG, deadline=0.0)
    harness.submit("other", PROMPT, {"e": 1.0}, LONG)
    harness.run()
    _late(harness, "routed", "named")
    assert not harness.tokens("routed")
    assert "0 tokens" in harness.terminal("named").error.message
    assert harness.tokens("other") == reference(materialised(llama, [(expert, 1.0)]), PROMPT, 60)
    harness.assert_idle()


@pytest.mark.parametrize("single_pass", [False, True])
def test_while_it_waits_to_be_routed(llama, expert, clock, single_pass):
    router = random_router(llama, ["e"], layer=1)
    harness = Harness(llama, [expert], rows=2, router=router, single_pass=single_pass, budget=Budget(61, 61))
    for i in range(6):
        harness.submit(f"r{i}", PROMPT, None, LONG, deadline=_soon())
    harness.step()
    clock.ahead = 2000
    harness.run()
    _late(harness, *(f"r{i}" for i in range(6)))
    harness.assert_idle()


def test_while_it_waits_for_a_place(llama, expert, clock):
    harness = Harness(llama, [expert], rows=1)
    harness.submit("runs", PROMPT, {"e": 1.0}, LONG)
    harness.submit("waits", PROMPT, {"e": 1.0}, LONG, deadline=_soon())
    for _ in range(5):
        harness.step()
    assert len(harness.engine.scheduler.waiting) == 1
    clock.ahead = 2000
    harness.step()
    _late(harness, "waits")
    harness.run()
    assert isinstance(harness.terminal("runs"), Finished)
    harness.assert_idle()


def test_while_it_waits_for_its_leader(llama, expert, clock):
    harness = Harness(llama, [expert], budget=Budget(16, 16))
    harness.submit("leader", PROMPT, {"e": 1.0}, LONG)
    harness.submit("late", PROMPT, {"e": 1.0}, LONG, leader="leader", deadline=_soon())
    harness.submit("patient", PROMPT, {"e": 1.0}, LONG, leader="leader")
    harness.step()
    clock.ahead = 2000
    harness.run()
    _late(harness, "late")
    assert harness.tokens("leader") == harness.tokens("patient")
    harness.assert_idle()


def test_while_its_expert_is_loaded(llama, expert, clock):
    executor = HeldExecutor()
    harness = Harness(llama, pool=SlotPool(max_experts=1), executor=executor)
    harness.register(expert)
    harness.submit("r", PROMPT, {"e": 1.0}, LONG, deadline=_soon())
    harness.step()
    assert harness.engine.stalled
    assert harness.engine.busy
    clock.ahead = 2000
    harness.step()
    _late(harness, "r")
    executor.run()
    harness.submit("next", PROMPT, {"e": 1.0}, LONG)
    harness.run()
    assert harness.tokens("next") == reference(materialised(llama, [(expert, 1.0)]), PROMPT, 60)
    harness.assert_idle()


def test_in_the_middle_of_its_prefill(llama, expert, clock, native):
    harness = Harness(llama, [expert], budget=Budget(16, 16), native=native)
    harness.submit("r", PROMPT, {"e": 1.0}, LONG, deadline=_soon())
    harness.submit("follower", PROMPT, {"e": 1.0}, LONG, leader="r")
    harness.step()
    harness.step()
    assert harness.engine.scheduler.running[0].computed == 32
    clock.ahead = 2000
    harness.step()
    _late(harness, "r")
    harness.run()
    assert harness.tokens("follower") == reference(materialised(llama, [(expert, 1.0)]), PROMPT, 60)
    harness.assert_idle()


def test_while_it_decodes(llama, expert, clock, native):
    harness = Harness(llama, [expert], native=native)
    harness.submit("r", PROMPT, {"e": 1.0}, LONG, deadline=_soon())
    harness.submit("other", PROMPT, {"e": 1.0}, LONG)
    for _ in range(10):
        harness.step()
    generated = harness.tokens("r")
    clock.ahead = 2000
    harness.step()
    _late(harness, "r")
    assert harness.tokens("r") == generated
    assert f"{len(generated)} tokens" in harness.terminal("r").error.message
    harness.run()
    expected = reference(materialised(llama, [(expert, 1.0)]), PROMPT, 60)
    assert generated == expected[: len(generated)]
    assert harness.tokens("other") == expected
    harness.assert_idle()


def test_after_it_was_preempted(llama, clock):
    harness = Harness(llama, kv_bytes=0, max_tokens=100)
    for i in range(4):
        harness.submit(f"r{i}", prompt_ids(i, 20, VOCABULARY), {}, LONG, deadline=_soon())
    while not any(sequence.preemptions for sequence in harness.engine.scheduler.waiting):
        harness.step()
    clock.ahead = 2000
    harness.run()
    _late(harness, *(f"r{i}" for i in range(4)))
    harness.assert_idle()


def test_a_deadline_that_is_kept_changes_nothing(llama, expert):
    harness = Harness(llama, [expert])
    harness.submit("r", PROMPT, {"e": 1.0}, LONG, deadline=_soon())
    harness.run()
    assert harness.tokens("r") == reference(materialised(llama, [(expert, 1.0)]), PROMPT, 60)
    harness.assert_idle()
