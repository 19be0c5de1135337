"""A fault stays with the request that has it; nothing leaks; the engine says when it is beyond help."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.core import Failed, Finished, Pattern, SamplingParams
from service.engine.live import Question
from service.engine.model import UnsupportedModelError, check_config
from service.engine.roster import StepResult
from service.engine.sampling.state import RowState
from service.errors import EngineDeadError, ExpertRejectedError, RequestFailedError
from service.scheduler.plan import StepPlan
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import GREEDY, Harness, materialised, prompt_ids, random_expert, reference

LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


@pytest.fixture
def path(llama) -> Path:
    return llama


@pytest.fixture
def expert(path: Path):
    return random_expert(AutoModelForCausalLM.from_pretrained(path), "e", seed=1)


def test_a_fault_in_the_forward_pass_fails_only_the_request_that_causes_it(path, expert, monkeypatch, native):
    harness = Harness(path, [expert], native=native)
    poison = prompt_ids(50, 7, VOCABULARY)
    forward = harness.model.forward

    def explode(batch):
        if any(list(poison) == batch.tokens[i : i + 7] for i in range(len(batch.tokens))):
            raise RuntimeError("a kernel gave up")
        return forward(batch)

    monkeypatch.setattr(harness.model, "forward", explode)
    harness.submit("a", prompt_ids(1, 9, VOCABULARY), {"e": 1.0}, LONG)
    harness.step()
    harness.submit("bad", poison, {"e": 1.0}, LONG)
    harness.submit("b", prompt_ids(2, 9, VOCABULARY), {}, LONG)
    harness.run()
    failure = harness.terminal("bad")
    assert isinstance(failure, Failed)
    assert isinstance(failure.error, RequestFailedError)
    assert "a kernel gave up" in failure.error.message
    assert harness.tokens("a") == reference(
        materialised(path, [(expert, 1.0)]), prompt_ids(1, 9, VOCABULARY), 30
    )
    assert harness.tokens("b") == reference(materialised(path, []), prompt_ids(2, 9, VOCABULARY), 30)
    harness.assert_idle()


@pytest.mark.parametrize("stage", ["record", "push"])
def test_a_fault_in_sampling_or_text_fails_only_its_request(path, stage, monkeypatch, native):
    harness = Harness(path, native=native)
    for name in ("a", "bad", "b"):
        harness.submit(name, prompt_ids(1, 9, VOCABULARY), {}, LONG)
    live = harness.engine._roster.get("bad")
    target = live.sampling if stage == "record" else live.text

    def explode(self, *args, **kwargs):
        if self is target:
            raise ValueError("broken")
        return original(self, *args, **kwargs)

    original = getattr(type(target), stage)
    monkeypatch.setattr(type(target), stage, explode)
    harness.run()
    assert isinstance(harness.terminal("bad"), Failed)
    expected = reference(materialised(path, []), prompt_ids(1, 9, VOCABULARY), 30)
    assert harness.tokens("a") == harness.tokens("b") == expected
    harness.assert_idle()


def test_an_exception_in_the_sampler_is_pinned_to_its_row(path, monkeypatch):
    harness = Harness(path)
    sampled = SamplingParams(max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    harness.submit("bad", prompt_ids(1, 9, VOCABULARY), {}, sampled)
    harness.submit("good", prompt_ids(2, 9, VOCABULARY), {}, LONG)
    bad = harness.engine._roster.get("bad").sampling
    monkeypatch.setattr(
        RowState, "edits_logits", property(lambda self: 1 / 0 if self is bad else False), raising=True
    )
    harness.run()
    assert isinstance(harness.terminal("bad"), Failed)
    assert isinstance(harness.terminal("good"), Finished)
    harness.assert_idle()


def test_an_overflowing_mix_fails_its_row_and_never_the_others_or_the_next_in_its_row(path, expert, native):
    harness = Harness(path, [expert], rows=2, native=native)
    harness.submit("bad", prompt_ids(1, 20, VOCABULARY), {"e": math.inf}, GREEDY)
    harness.submit("beside", prompt_ids(3, 20, VOCABULARY), {"e": 1.0}, LONG)
    harness.submit("good", prompt_ids(2, 5, VOCABULARY), {"e": 1.0}, GREEDY)
    harness.run()
    assert "NaN" in harness.terminal("bad").error.message
    beside = reference(materialised(path, [(expert, 1.0)]), prompt_ids(3, 20, VOCABULARY), 30)
    assert harness.tokens("beside") == beside
    assert harness.tokens("good") == reference(
        materialised(path, [(expert, 1.0)]), prompt_ids(2, 5, VOCABULARY), 8
    )
    harness.assert_idle()


def test_a_model_that_always_fails_breaks_the_engine_after_a_few_steps(path, monkeypatch):
    harness = Harness(path)

    def explode(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(harness.model, "forward", explode)
    for i in range(7):
        harness.submit(f"r{i}", prompt_ids(1, 4, VOCABULARY), {})
        harness.step()
    harness.submit("last", prompt_ids(1, 4, VOCABULARY), {})
    assert "no memory" in harness.step().broken
    assert isinstance(harness.terminal("last"), Failed)


def test_a_question_in_a_step_that_dies_is_still_answered(path, monkeypatch):
    harness = Harness(path)
    answers: list[torch.Tensor | Exception] = []
    harness.engine.ask(Question(prompt_ids(1, 5, VOCABULARY), answers.append))

    def explode(*_):
        raise MemoryError

    monkeypatch.setattr(harness.engine, "_conclude", explode)
    with pytest.raises(MemoryError):
        harness.step()
    gone = EngineDeadError("the engine has stopped")
    harness.engine.fail_all(gone, StepResult())
    assert answers == [gone]


def test_an_expert_that_finds_no_memory_is_not_named_afterwards(path, expert, monkeypatch):
    harness = Harness(path)

    def explode(*_):
        raise MemoryError

    monkeypatch.setattr(harness.model.bank._native, "set_expert", explode)
    with pytest.raises(MemoryError):
        harness.publish(expert)
    assert harness.catalogue.current() == {}
    monkeypatch.undo()
    harness.publish(expert)
    harness.submit("r", prompt_ids(2, 9, VOCABULARY), {"e": 1.0})
    harness.run()
    assert isinstance(harness.terminal("r"), Finished)
    harness.assert_idle()


def test_cancelled_requests_end_once_and_free_everything(path, expert, native):
    harness = Harness(path, [expert], rows=2, native=native)
    for i in range(6):
        harness.submit(f"r{i}", prompt_ids(i, 30, VOCABULARY), {"e": 1.0}, LONG)
    for i in range(6):
        harness.cancel(f"r{i}")
        harness.cancel(f"r{i}")
        if harness.engine.busy:
            harness.step()
    harness.run()
    assert {harness.finished(f"r{i}").reason for i in range(6)} == {"cancelled"}
    harness.assert_idle()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("end", ["cancelled", "preempted", "late"])
def test_what_ends_in_its_prefill_leaves_no_nan_for_the_next_in_its_blocks(
    path, expert, end, prefix_cache, native, monkeypatch
):
    # Nobody has seen logits of these tokens, so nobody knows that their keys and values are NaN.
    harness = Harness(
        path, [expert], rows=2, kv_bytes=0, native=native, prefix_cache=prefix_cache, budget=Budget(60, 60)
    )
    harness.submit("bad", prompt_ids(1, 100, VOCABULARY), {"e": math.inf}, GREEDY, deadline=math.inf)
    harness.step()
    scheduler = harness.engine.scheduler
    if end == "late":
        scheduler._deadlines._deadlines[scheduler.running[0]] = scheduler._deadlines._soonest = 0.0
    elif end == "preempted":
        scheduler._preempt(scheduler.running[0], StepPlan(), 0.0)
        harness.submit("good", prompt_ids(2, 50, VOCABULARY), {"e": 1.0}, LONG, priority=-1)
        harness.run()
        good = reference(materialised(path, [(expert, 1.0)]), prompt_ids(2, 50, VOCABULARY), 30)
        assert harness.tokens("good") == good
    else:
        harness.cancel("bad")
    for i in range(4):
        harness.submit(f"next{i}", prompt_ids(2 + i, 50, VOCABULARY), {"e": 1.0}, GREEDY)
        harness.run()
        expected = reference(materialised(path, [(expert, 1.0)]), prompt_ids(2 + i, 50, VOCABULARY), 8)
        assert harness.tokens(f"next{i}") == expected
    harness.assert_idle()


@pytest.mark.parametrize("broken", ["_table", "_mix", "_gate_tensors"])
def test_gates_that_could_not_be_set_are_not_taken_for_set(path, expert, broken, monkeypatch):
    harness = Harness(path, [expert])
    harness.submit("a", prompt_ids(1, 9, VOCABULARY), {"e": 1.0}, LONG)
    for _ in range(4):
        harness.step()
    bank, last = harness.model.bank, harness.model.bank._last
    original = getattr(bank, broken)
    failures = iter([True, True])

    def explode(*arguments):
        if next(failures, False):
            raise MemoryError("no room for gates")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bank, broken, explode)
        # One token with other gates: the step fails, then this request alone.
        key = next(iter(bank._resident))
        for _ in range(2):
            with pytest.raises(MemoryError):
                bank.set_gates([Pattern(((key, 0.5),))], [1], [1])
    assert last is not None
    assert bank._last is None
    harness.run()
    assert harness.tokens("a") == reference(
        materialised(path, [(expert, 1.0)]), prompt_ids(1, 9, VOCABULARY), 30
    )
    harness.assert_idle()


def test_stop_ids_end_of_sequence_and_minimum_length_decide_the_end(path):
    prompt = prompt_ids(4, 9, VOCABULARY)
    expected = reference(materialised(path, []), prompt, 30)
    third = expected[2]
    first = expected.index(third)
    harness = Harness(path)
    stop = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=frozenset({third}))
    harness.submit("stop", prompt, {}, stop)
    harness.submit("one", prompt, {}, SamplingParams(max_tokens=1, temperature=0))
    harness.run()
    ended = harness.finished("stop")
    assert (ended.reason, ended.stop_reason) == ("stop", third)
    assert harness.tokens("stop") == expected[: first + 1]
    assert ended.usage.completion_tokens == first + 1
    assert harness.finished("one").reason == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"attn_logit_softcapping": 30.0}, "softcapping"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_models_that_packed_steps_cannot_run_exactly_are_refused_by_name(path, change, message):
    config = AutoConfig.from_pretrained(path)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        check_config(config)


def test_an_expert_with_nan_is_refused_because_no_gate_could_silence_it(path, expert):
    name, factors = next(iter(expert.factors.items()))
    broken = type(factors)(factors.U * torch.nan, factors.S, factors.Vh)
    with pytest.raises(ExpertRejectedError, match=f"'{name}' holds NaN"):
        Harness(path).publish(type(expert)("nan", 1, dict(expert.factors) | {name: broken}, {}))


def test_an_expert_of_another_shape_is_refused_and_nothing_changes(path, tmp_path):
    other = tiny_model("llama", tmp_path / "wide", seed=1, intermediate_size=96)
    stranger = random_expert(AutoModelForCausalLM.from_pretrained(other), "stranger", seed=1)
    harness = Harness(path)
    with pytest.raises(ExpertRejectedError, match="mlp"):
        harness.publish(stranger)
    assert harness.catalogue.current() == {}
    assert harness.model.bank.resident_count == 0
