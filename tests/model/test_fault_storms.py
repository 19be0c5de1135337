"""Faults, cancellations and shortage under load: whoever has no fault of its own gets its answer, nothing leaks."""

import gc
import random

import pytest
from transformers import AutoModelForCausalLM

from service.core import Failed, Finished, SamplingParams
from service.engine import engine as engine_module
from service.engine.live import Live
from service.engine.sampling.state import RowState
from service.engine.text import TextStream
from service.gating.slots import SlotPool
from service.scheduler.policy import Budget
from service.scheduler.sequence import Sequence
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference

MIXES = [{}, {"e0": 1.0}, {"e0": 0.5, "e1": 0.5}]


@pytest.fixture(scope="module")
def experts(plain_llama):
    return [random_expert(plain_llama, f"e{i}", seed=i) for i in range(2)]


@pytest.fixture(scope="module")
def truth(llama, experts):
    """Number of a request → its tokens."""
    found = {}
    for number in range(12):
        mix = MIXES[number % 3]
        model = materialised(llama, [(e, mix[e.name]) for e in experts if e.name in mix])
        found[number] = reference(model, prompt_ids(number, 8 + 3 * number, VOCABULARY), 25)
    return found


def _submit(harness: Harness, name: str, number: int, **more) -> None:
    sampling = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True)
    harness.submit(name, prompt_ids(number, 8 + 3 * number, VOCABULARY), MIXES[number % 3], sampling, **more)


@pytest.mark.parametrize("place", ["forward", "layers", "sampler", "record", "detokeniser"])
def test_faults_at_random_steps_under_load(llama, experts, truth, place, native, monkeypatch):
    harness = Harness(llama, experts, native=native, kv_bytes=2**16, budget=Budget(32, 16))
    luck = random.Random(5)

    def unlucky(original, odds):
        def call(*arguments, **named):
            if luck.random() < odds:
                raise RuntimeError(f"{place} gave up")
            return original(*arguments, **named)

        return call

    if place == "forward":
        monkeypatch.setattr(harness.model, "forward", unlucky(harness.model.forward, 0.1))
    elif place == "layers":
        name, target = ("run", harness.model.native) if harness.model.native else ("_own_pass", harness.model)
        monkeypatch.setattr(type(target), name, unlucky(getattr(type(target), name), 0.1))
    elif place == "sampler":
        monkeypatch.setattr(engine_module, "sample", _unlucky_rows(engine_module.sample, luck))
    elif place == "record":
        monkeypatch.setattr(RowState, "record", unlucky(RowState.record, 0.01))
    else:
        monkeypatch.setattr(TextStream, "push", unlucky(TextStream.push, 0.01))
    for round_ in range(3):
        for number in range(12):
            _submit(harness, f"{round_}-{number}", number)
            harness.step()
    harness.run()
    ends = {name: harness.terminal(name) for name in harness.events}
    failed = [name for name, end in ends.items() if isinstance(end, Failed)]
    assert 0 < len(failed) < 36
    assert all(f"{place} gave up" in ends[name].error.message for name in failed)
    for name in ends.keys() - set(failed):
        assert harness.tokens(name) == truth[int(name.split("-")[1])], name
    harness.assert_idle()


def _unlucky_rows(original, luck):
    """Some rows of some steps have an error instead of a token."""

    def call(logits, rows):
        return [
            RuntimeError("sampler gave up") if luck.random() < 0.01 else token
            for token in original(logits, rows)
        ]

    return call


@pytest.mark.parametrize("slots", [None, 1])
def test_a_storm_of_cancellations(llama, experts, truth, slots, native):
    harness = Harness(
        llama, experts, native=native, kv_bytes=2**16, budget=Budget(32, 16), pool=SlotPool(max_experts=slots)
    )
    luck = random.Random(7)
    kept = set()
    for round_ in range(8):
        for number in range(12):
            name = f"{round_}-{number}"
            leader = f"{round_ - 1}-{number}" if round_ % 2 else None
            _submit(harness, name, number, leader=leader, priority=number % 2, client=f"c{number % 5}")
            if luck.random() < 0.2:
                kept.add(name)
        for name in luck.sample(sorted(harness.events), min(30, len(harness.events))):
            if name not in kept:
                harness.cancel(name)
        harness.step()
    for name in harness.events:
        if name not in kept:
            harness.cancel(name)
            harness.cancel(name)
    harness.run()
    for name in kept:
        assert harness.tokens(name) == truth[int(name.split("-")[1])]
    for name in harness.events.keys() - kept:
        assert harness.finished(name).reason in {"cancelled", "length"}
    harness.assert_idle()


def test_an_exhausted_cache_delays_and_fails_nobody(llama, experts, truth, native):
    harness = Harness(
        llama, experts, native=native, kv_bytes=0, max_tokens=80, budget=Budget(32, 16), rows=12
    )
    for round_ in range(3):
        for number in range(12):
            _submit(harness, f"{round_}-{number}", number)
    while harness.engine.busy:
        harness.step()
        harness.engine.scheduler.check()
        assert harness.steps < 3000
    assert harness.preemptions > 0
    for name in harness.events:
        assert harness.tokens(name) == truth[int(name.split("-")[1])]
    harness.assert_idle()


def test_a_request_that_can_never_fit_fails_at_once_and_alone(llama, experts, truth):
    harness = Harness(llama, experts, kv_bytes=0, max_tokens=80)
    harness.submit("huge", prompt_ids(1, 150, VOCABULARY), {}, SamplingParams(max_tokens=50, temperature=0))
    _submit(harness, "fits", 3)
    harness.run()
    assert isinstance(harness.terminal("huge"), Failed)
    assert harness.tokens("fits") == truth[3]
    harness.assert_idle()


def test_ten_thousand_small_requests_leave_nothing(tmp_path):
    path = tiny_model("llama", tmp_path / "m", seed=1, num_hidden_layers=1)
    plain = AutoModelForCausalLM.from_pretrained(path)
    experts = [random_expert(plain, f"e{i}", seed=i) for i in range(2)]
    harness = Harness(path, experts, rows=64, budget=Budget(1024, 512), kv_bytes=2**19)
    prompts = [prompt_ids(i, 1 + i % 40, VOCABULARY) for i in range(64)]
    samplings = [
        SamplingParams(max_tokens=1 + i, temperature=float(i), seed=i, ignore_eos=True) for i in range(3)
    ]
    luck, before = random.Random(3), None

    def held() -> tuple[int, int, int]:
        model, pool = harness.model, harness.engine.residency.pool
        return model.bank.nbytes, model.cache.nbytes, pool.used_bytes

    for number in range(10_000):
        harness.submit(
            f"r{number}", prompts[number % 64], MIXES[number % 3], samplings[number % 3],
            client=f"c{number % 97}", priority=number % 2, deadline=1e12 if number % 5 else None,
        )  # fmt: skip
        if luck.random() < 0.05:
            harness.cancel(f"r{number}")
        if number % 100 == 99:
            harness.run(100_000)
            harness.assert_idle()
            ends = [harness.terminal(name) for name in harness.events]
            assert all(isinstance(end, Finished) for end in ends)
            harness.events.clear()
            harness.stats.clear()
        if number == 1999:
            before, objects = held(), _alive()
    assert held() == before
    assert _alive() <= objects + 50
    ours = {Live, Sequence, RowState, TextStream}
    assert not [thing for thing in gc.get_objects() if type(thing) in ours]


def _alive() -> int:
    gc.collect()
    return len(gc.get_objects())
