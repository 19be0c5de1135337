"""A prefix that was computed once is found again, by exactly those for whom it is the same."""

import pytest
from transformers import AutoModelForCausalLM

from service.core import SamplingParams
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.test_ground_truth import CASES

TEN = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)


def _experts(path, count: int = 2):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5)) for i in range(count)]


def _ask(harness: Harness, name: str, prompt, gates, sampling=TEN, **more) -> int:
    """Run one request; how many prompt tokens it found."""
    harness.submit(name, prompt, gates, sampling, **more)
    harness.run()
    return harness.finished(name).usage.cached_tokens


@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_the_same_prompt_under_the_same_gates_is_found_and_answered_the_same(architecture, native, folders):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(path, experts, native=native)
    prompt, gates = prompt_ids(1, 41, VOCABULARY), {"e0": 0.75, "e1": 0.25}
    assert _ask(harness, "first", prompt, gates) == 0
    computed = harness.prefilled
    assert _ask(harness, "again", prompt, gates) == 32
    assert harness.prefilled - computed == 41 - 32
    part = (*prompt[:20], *prompt_ids(2, 20, VOCABULARY))
    assert _ask(harness, "part", part, gates) == 16
    exact = prompt[:32]
    assert _ask(harness, "whole blocks", exact, gates) == 16
    mix = [(experts[0], 0.75), (experts[1], 0.25)]
    model = materialised(path, mix)
    assert harness.tokens("first") == harness.tokens("again") == reference(model, prompt, 10)
    assert harness.tokens("part") == reference(model, part, 10)
    assert harness.tokens("whole blocks") == reference(model, exact, 10)
    gauges = harness.engine.gauges(alive=True)
    assert (gauges.prefix_hits, gauges.prefix_queries) == (32 + 16 + 16, 41 + 41 + 40 + 32)
    assert gauges.kv_blocks_cached > 0
    harness.assert_idle()


@pytest.mark.parametrize("other", [{}, {"e0": 0.5}, {"e1": 1.0}, {"e0": 1.0, "e1": 0.001}], ids=str)
def test_other_gates_never_find_it(llama, other, native):
    experts = _experts(llama)
    harness = Harness(llama, experts, native=native)
    prompt = prompt_ids(1, 50, VOCABULARY)
    _ask(harness, "first", prompt, {"e0": 1.0})
    assert _ask(harness, "other", prompt, other) == 0
    model = materialised(llama, [(experts[int(name[1])], gate) for name, gate in other.items()])
    assert harness.tokens("other") == reference(model, prompt, 10)
    # Gates of nothing are no gates.
    assert _ask(harness, "same", prompt, {"e0": 1.0, "e1": 0.0}) == 48
    harness.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_conversation_finds_its_earlier_turns(architecture, folders, native):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, max_tokens=250)
    model = materialised(path, [(experts[0], 1.0)])
    turns = prompt_ids(1, 30, VOCABULARY)
    for turn in range(4):
        found = _ask(harness, f"turn{turn}", turns, {"e0": 1.0})
        answer = harness.tokens(f"turn{turn}")
        assert answer == reference(model, turns, 10)
        # All of the last prompt and answer but the last token, which nobody has computed; whole blocks.
        assert found == (0 if turn == 0 else (len(turns) - 20 - 1) // 16 * 16)
        turns = (*turns, *answer, *prompt_ids(9 + turn, 20, VOCABULARY))
    harness.assert_idle()


def test_another_generation_never_finds_it_even_while_the_old_one_still_runs(llama, native):
    experts = _experts(llama)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    second = random_expert(plain, "e0", seed=77, generation=2)
    harness = Harness(llama, experts, native=native)
    prompt = prompt_ids(1, 40, VOCABULARY)
    _ask(harness, "before", prompt, {"e0": 1.0})
    harness.submit("old", prompt, {"e0": 1.0}, LONG)
    harness.step()
    harness.publish(second)
    harness.submit("new", prompt, {"e0": 1.0}, TEN)
    while harness.engine._roster.get("new"):
        harness.step()
    assert harness.engine._roster.get("old")
    assert harness.finished("new").usage.cached_tokens == 0
    assert _ask(harness, "again", prompt, {"e0": 1.0}) == 32
    old, new = (materialised(llama, [(expert, 1.0)]) for expert in (experts[0], second))
    assert harness.finished("old").usage.cached_tokens == 32
    assert harness.tokens("old") == reference(old, prompt, 60)
    assert harness.tokens("new") == harness.tokens("again") == reference(new, prompt, 10)
    harness.assert_idle()


def test_a_generation_that_is_gone_leaves_nothing_behind(llama):
    experts = _experts(llama)
    harness = Harness(llama, experts)
    _ask(harness, "first", prompt_ids(1, 40, VOCABULARY), {"e0": 1.0})
    _ask(harness, "other", prompt_ids(1, 40, VOCABULARY), {"e1": 1.0})
    kv = harness.engine.scheduler.kv
    cached = kv.cached_blocks
    harness.retire("e0")
    assert kv.cached_blocks == cached // 2
    # The same generation, published again: what was forgotten is not found.
    harness.publish(experts[0])
    assert _ask(harness, "back", prompt_ids(1, 40, VOCABULARY), {"e0": 1.0}) == 0
    harness.retire("e0")
    harness.retire("e1")
    assert kv.cached_blocks == 0
    harness.assert_idle()


def test_without_the_cache_nothing_is_found(llama):
    harness = Harness(llama, prefix_cache=False)
    prompt = prompt_ids(1, 40, VOCABULARY)
    _ask(harness, "first", prompt, {})
    assert _ask(harness, "again", prompt, {}) == 0
    assert harness.tokens("first") == harness.tokens("again")
    assert harness.engine.scheduler.kv.cached_blocks == 0
    harness.assert_idle()


def test_a_request_for_prompt_logprobs_computes_its_whole_prompt(llama):
    harness = Harness(llama)
    prompt = prompt_ids(1, 40, VOCABULARY)
    _ask(harness, "first", prompt, {})
    asked = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=0)
    assert _ask(harness, "asked", prompt, {}, asked) == 0
    assert len(harness.finished("asked").prompt_logprobs) == 39
    harness.assert_idle()


def test_a_failed_prefill_is_never_found_again(llama, monkeypatch):
    harness = Harness(llama)
    prompt = prompt_ids(1, 100, VOCABULARY)
    forward = harness.model.forward

    def corrupt(batch):
        found = forward(batch)
        if 70 in batch.positions:
            found.logits.fill_(float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(harness.model, "forward", corrupt)
        harness.submit("bad", prompt, {}, TEN)
        harness.run()
    assert "NaN" in harness.terminal("bad").error.message
    assert _ask(harness, "again", prompt, {}) == 0
    harness.assert_idle()
