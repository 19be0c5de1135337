"""Materialised weights for a pattern that has the engine to itself: the same answers, and never stale ones."""

import pytest
from transformers import AutoModelForCausalLM

from service.core import ExpertKey, SamplingParams
from service.engine.merged import StepCosts
from tests.fixtures.executors import HeldExecutor
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, inner, materialised, prompt_ids, random_expert, reference

COMPILED = ("llama", "qwen3", "gemma3")
LONG = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPT = prompt_ids(1, 20, VOCABULARY)


def _experts(path, count: int = 4):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [
        random_expert(plain, f"e{i}", seed=i, ranks=(3, 5), exact=False, only=inner) for i in range(count)
    ]


@pytest.fixture(scope="module")
def experts(llama):
    return _experts(llama)


def _harness(path, experts, mode="merged", **more) -> Harness:
    harness = Harness(path, experts, mode=mode, native="on", prefix_cache=False, **more)
    assert harness.engine.merged is not None
    return harness


def _ask(harness: Harness, name: str, gates) -> str:
    """Run one request alone; the mode that its answer tells."""
    harness.submit(name, PROMPT, gates, LONG)
    harness.run()
    return harness.finished(name).routing.mode


def _expected(path, experts, gates, prompt=PROMPT, tokens: int = 24) -> list[int]:
    by_name = {expert.name: expert for expert in experts}
    return reference(materialised(path, [(by_name[n], g) for n, g in gates.items()]), prompt, tokens)


@pytest.mark.parametrize("architecture", COMPILED)
def test_a_lone_pattern_runs_on_its_own_weights_and_equals_the_ground_truth(architecture, folders):
    path = folders[architecture]
    experts = _experts(path, 2)
    harness = _harness(path, experts)
    for number, gates in enumerate([{"e0": 1.0}, {"e0": 0.5, "e1": 0.5}, {"e1": -0.5, "e0": 1.25}]):
        assert _ask(harness, f"r{number}", gates) == "merged"
        assert harness.tokens(f"r{number}") == _expected(path, experts, gates)
    assert _ask(harness, "plain", {}) == "shared"
    assert harness.tokens("plain") == _expected(path, experts, {})
    assert {stats.mode for stats in harness.stats} == {"merged", "shared"}
    assert all(stats.active_experts == 0 for stats in harness.stats if stats.mode == "merged")
    assert harness.engine.merged.stats.made == 3
    harness.assert_idle()


def test_several_requests_of_one_pattern_share_its_weights(llama, experts):
    harness = _harness(llama, experts)
    prompts = [prompt_ids(i, 10 + i, VOCABULARY) for i in range(4)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, {"e0": 1.0}, LONG)
    harness.run()
    for i, prompt in enumerate(prompts):
        assert harness.tokens(f"r{i}") == _expected(llama, experts, {"e0": 1.0}, prompt)
        assert harness.finished(f"r{i}").routing.mode == "merged"
    assert harness.engine.merged.stats.made == 1


def test_a_request_changes_between_merged_and_factored_as_others_come_and_go(llama, experts):
    harness = _harness(llama, experts)
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    harness.submit("long", PROMPT, {"e0": 1.0, "e1": 0.25}, sampling)
    for _ in range(8):
        harness.step()
    harness.submit("short", prompt_ids(2, 30, VOCABULARY), {"e1": 1.0}, LONG)
    harness.run()
    modes = [stats.mode for stats in harness.stats]
    first, last = modes.index("factored"), len(modes) - modes[::-1].index("factored")
    assert modes[:first] == ["merged"] * first
    assert set(modes[first:last]) == {"factored"}
    assert modes[last:] == ["merged"] * (len(modes) - last)
    assert 0 < first < last < len(modes)
    assert harness.tokens("long") == _expected(llama, experts, {"e0": 1.0, "e1": 0.25}, tokens=40)
    expected = _expected(llama, experts, {"e1": 1.0}, prompt_ids(2, 30, VOCABULARY))
    assert harness.tokens("short") == expected
    # Most of the one's tokens, and only the fewer of the other's, came from materialised weights.
    assert harness.finished("short").routing.mode == "factored"
    harness.assert_idle()


def test_the_least_recently_used_weights_go_when_the_bytes_run_out(llama, experts):
    size = _harness(llama, experts).engine.merged._size
    harness = _harness(llama, experts, merged_bytes=2 * size)
    merged = harness.engine.merged
    for name, gates in (("a", {"e0": 1.0}), ("b", {"e1": 1.0}), ("a again", {"e0": 1.0}), ("c", {"e2": 1.0})):
        assert _ask(harness, name, gates) == "merged"
        assert merged.stats.nbytes <= 2 * size
        assert harness.tokens(name) == _expected(llama, experts, gates)
    assert (merged.stats.made, merged.stats.evicted) == (3, 1)
    _ask(harness, "a kept", {"e0": 1.0})
    assert merged.stats.made == 3
    _ask(harness, "b gone", {"e1": 1.0})
    assert (merged.stats.made, merged.stats.evicted) == (4, 2)
    assert harness.tokens("b gone") == harness.tokens("b")
    assert harness.engine.gauges(alive=True).merged_bytes == 2 * size


def test_a_bound_below_one_set_of_weights_makes_none(llama, experts):
    size = _harness(llama, experts).engine.merged._size
    harness = _harness(llama, experts, merged_bytes=size - 1)
    assert _ask(harness, "r", {"e0": 1.0}) == "factored"
    assert harness.engine.merged.stats.made == 0


def test_weights_of_a_replaced_generation_are_dropped_and_never_used(llama, plain_llama, experts):
    harness = _harness(llama, experts)
    merged = harness.engine.merged
    _ask(harness, "old", {"e0": 1.0})
    _ask(harness, "mixed", {"e0": 0.5, "e1": 0.5})
    _ask(harness, "other", {"e1": 1.0})
    before = merged.stats.nbytes
    second = random_expert(plain_llama, "e0", seed=88, generation=2, exact=False, only=inner)
    harness.submit("holding", PROMPT, {"e0": 1.0}, LONG)
    harness.step()
    harness.publish(second)
    assert merged.stats.nbytes == before
    harness.run()
    assert merged.stats.nbytes == before // 3
    assert harness.tokens("holding") == harness.tokens("old") == _expected(llama, experts, {"e0": 1.0})
    assert _ask(harness, "new", {"e0": 1.0}) == "merged"
    assert harness.tokens("new") == _expected(llama, [second], {"e0": 1.0})
    harness.retire("e0")
    harness.retire("e1")
    assert merged.stats.nbytes == 0
    harness.assert_idle()


def test_a_generation_that_goes_while_its_weights_are_made_leaves_none(llama, plain_llama, experts):
    executor = HeldExecutor()
    harness = _harness(llama, experts, executor=executor)
    harness.submit("old", PROMPT, {"e0": 1.0}, LONG)
    harness.run()
    assert len(executor.held) == 1
    second = random_expert(plain_llama, "e0", seed=88, generation=2, exact=False, only=inner)
    harness.publish(second)
    executor.run()
    assert _ask(harness, "new", {"e0": 1.0}) == "factored"
    assert harness.engine.merged.stats.made == 0
    executor.run()
    assert _ask(harness, "newer", {"e0": 1.0}) == "merged"
    assert harness.tokens("new") == harness.tokens("newer") == _expected(llama, [second], {"e0": 1.0})
    harness.assert_idle()


def test_requests_do_not_wait_for_weights_that_are_being_made(llama, experts):
    executor = HeldExecutor()
    harness = _harness(llama, experts, executor=executor)
    harness.submit("r", PROMPT, {"e0": 1.0}, LONG)
    for _ in range(6):
        harness.step()
    assert {stats.mode for stats in harness.stats} == {"factored"}
    executor.run()
    harness.run()
    assert harness.stats[-1].mode == "merged"
    assert harness.tokens("r") == _expected(llama, experts, {"e0": 1.0})
    assert harness.finished("r").routing.mode == "merged"


def test_weights_that_cannot_be_made_cost_nobody_an_answer(llama, experts, monkeypatch, caplog):
    harness = _harness(llama, experts)

    def explode(_weight_of):
        raise MemoryError("no room")

    monkeypatch.setattr(type(harness.model.native), "prepare", lambda self, weight_of: explode(weight_of))
    assert _ask(harness, "r", {"e0": 1.0}) == "factored"
    assert harness.tokens("r") == _expected(llama, experts, {"e0": 1.0})
    assert harness.engine.merged.stats.failed >= 1
    assert "could not be made" in caplog.text
    harness.assert_idle()


def test_auto_makes_weights_once_a_pattern_has_cost_as_much_as_they_do(llama, experts):
    harness = _harness(llama, experts, "auto")
    # A step costs a second for each factor row; the step in which a pattern has paid the weights has them.
    harness.engine.merged.costs = StepCosts(extra=((1, 1.0), (64, 1.0)), making=19.0, ranks=1)
    before = {
        name: -(-19 // harness.model.bank.resident(ExpertKey(name, 1)).max_rank) - 1 for name in ("e0", "e1")
    }
    assert _ask(harness, "r", {"e0": 1.0}) == "merged"
    modes = [stats.mode for stats in harness.stats]
    assert modes == ["factored"] * before["e0"] + ["merged"] * (len(modes) - before["e0"])
    assert harness.tokens("r") == _expected(llama, experts, {"e0": 1.0})
    # Another pattern has its own account.
    begun = len(harness.stats)
    _ask(harness, "other", {"e1": 1.0})
    assert [stats.mode for stats in harness.stats[begun:]].count("factored") == before["e1"]


def test_auto_never_makes_weights_that_gain_nothing(llama, experts):
    harness = _harness(llama, experts, "auto")
    costs = harness.engine.merged.costs
    assert costs.making > 0
    assert [tokens for tokens, _ in costs.extra] == sorted(tokens for tokens, _ in costs.extra)
    harness.engine.merged.costs = StepCosts(extra=((1, 0.0), (64, 0.0)), making=1e-9)
    assert _ask(harness, "r", {"e0": 1.0}) == "factored"
    assert harness.engine.merged.stats.made == 0


def test_measuring_costs_leaves_no_trace(llama, experts):
    harness = Harness(llama, mode="auto", native="on")
    assert harness.model.bank.resident_count == 0
    assert not any(layer.keys.any() or layer.values.any() for layer in harness.model.cache.layers.values())


def test_what_lies_outside_of_the_layers_matrices_is_always_factored(llama, plain_llama):
    experts = [
        random_expert(plain_llama, "norms", seed=1, only=lambda name: inner(name) or "layernorm" in name),
        random_expert(plain_llama, "table", seed=2, exact=False),
    ]
    harness = _harness(llama, experts)
    for expert in experts:
        assert _ask(harness, expert.name, {expert.name: 1.0}) == "factored"
        assert harness.tokens(expert.name) == _expected(llama, experts, {expert.name: 1.0})
    assert harness.engine.merged.stats.made == 0


def test_biases_of_the_shared_expert_are_kept(tmp_path):
    path = tiny_model("llama", tmp_path / "m", seed=2, attention_bias=True, mlp_bias=True)
    experts = _experts(path, 1)
    harness = _harness(path, experts)
    assert _ask(harness, "r", {"e0": 1.0}) == "merged"
    assert harness.tokens("r") == _expected(path, experts, {"e0": 1.0})
