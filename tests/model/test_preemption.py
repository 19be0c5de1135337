"""Too little KV memory for everybody: requests give way, begin again, and answer as if nothing had happened."""

import pytest
from transformers import AutoModelForCausalLM

from service.core import SamplingParams
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.test_ground_truth import CASES

MIXES = [{}, {"e0": 1.0}, {"e0": 0.5, "e1": 0.5}, {"e1": -0.5}]


def _experts(path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5)) for i in range(2)]


def _model(path, experts, mix):
    return materialised(path, [(expert, mix[expert.name]) for expert in experts if expert.name in mix])


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_everybody_who_had_to_give_way_still_gives_the_ground_truth(
    architecture, native, prefix_cache, folders
):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(
        path, experts, kv_bytes=0, max_tokens=100, native=native, prefix_cache=prefix_cache,
        budget=Budget(32, 16),
    )  # fmt: skip
    prompts = [prompt_ids(i, 9 + 7 * i, VOCABULARY) for i in range(6)]
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=45, temperature=0, ignore_eos=True)
        harness.submit(f"r{i}", prompt, MIXES[i % 4], sampling)
    harness.run()
    assert harness.preemptions > 0
    for i, prompt in enumerate(prompts):
        assert harness.tokens(f"r{i}") == reference(_model(path, experts, MIXES[i % 4]), prompt, 45), i
    harness.assert_idle()


def test_drawn_tokens_are_the_same_as_without_giving_way(llama, native):
    experts = _experts(llama)
    roomy = Harness(llama, experts, native="off", prefix_cache=False)
    tight = Harness(llama, experts, native=native, kv_bytes=0, max_tokens=100, budget=Budget(32, 16))
    for harness in (roomy, tight):
        for i in range(8):
            sampling = SamplingParams(
                max_tokens=40, temperature=0.9, seed=i, top_p=0.95, repetition_penalty=1.1, ignore_eos=True
            )
            harness.submit(f"r{i}", prompt_ids(i, 10 + 3 * i, VOCABULARY), MIXES[i % 4], sampling)
            if harness is roomy:
                harness.run()
        harness.run()
    assert tight.preemptions > 0
    assert roomy.preemptions == 0
    for i in range(8):
        assert tight.tokens(f"r{i}") == roomy.tokens(f"r{i}")
        assert tight.text(f"r{i}") == roomy.text(f"r{i}")
    tight.assert_idle()


def test_the_less_urgent_gives_way_and_the_urgent_never(llama):
    harness = Harness(llama, kv_bytes=0, max_tokens=100)
    sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    for i in range(4):
        harness.submit(f"late{i}", prompt_ids(i, 20, VOCABULARY), {}, sampling, priority=5)
    for _ in range(10):
        harness.step()
    harness.submit("urgent", prompt_ids(9, 20, VOCABULARY), {}, sampling, priority=-1)
    urgent = harness.engine._roster.get("urgent").sequence
    while harness.engine.busy:
        harness.step()
        assert urgent.preemptions == 0
    assert harness.preemptions > 0
    assert harness.tokens("urgent") == reference(materialised(llama, []), prompt_ids(9, 20, VOCABULARY), 60)
    harness.assert_idle()


def test_a_single_longest_request_fits_the_smallest_cache(folders, native):
    for architecture in ("llama", "gemma3"):
        harness = Harness(folders[architecture], kv_bytes=0, max_tokens=128, native=native)
        sampling = SamplingParams(max_tokens=28, temperature=0, ignore_eos=True)
        prompt = prompt_ids(1, 100, VOCABULARY)
        for i in range(3):
            harness.submit(f"r{i}", prompt, {}, sampling)
        harness.run()
        expected = reference(materialised(folders[architecture], []), prompt, 28)
        assert all(harness.tokens(f"r{i}") == expected for i in range(3))
        harness.assert_idle()
