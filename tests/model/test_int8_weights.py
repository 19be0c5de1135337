"""A shared expert kept as int8: exactly the model that the rounded weights are, under any gates."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.routing import extract_features, neutral_prompts, render_prompts
from service.engine.live import Question
from service.engine.model import UnsupportedModelError
from service.native.quantise import dequantised
from service.serve import runtime_config
from service.settings import Settings
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import GREEDY, Harness, inner, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router

MIXES = [{}, {"e0": 1.0}, {"e0": 0.5, "e1": 0.5}, {"e1": -0.5}]


def _rounded(path: Path, to: Path) -> Path:
    """The same model with every matrix of its decoder layers as int8 keeps it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if inner(name):
                parameter.copy_(dequantised(parameter))
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(path).save_pretrained(to)
    return to


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_answers_are_those_of_the_rounded_weights_under_any_gates(architecture, folders, tmp_path):
    path = folders[architecture]
    plain = AutoModelForCausalLM.from_pretrained(path)
    experts = [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5)) for i in range(2)]
    harness = Harness(path, experts, native="on", int8=True)
    rounded = _rounded(path, tmp_path / "rounded")
    prompts = [prompt_ids(i, 5 + 9 * i, VOCABULARY) for i in range(len(MIXES))]
    for number, (gates, prompt) in enumerate(zip(MIXES, prompts, strict=True)):
        harness.submit(str(number), prompt, gates, GREEDY)
    harness.run()
    by_name = {expert.name: expert for expert in experts}
    for number, (gates, prompt) in enumerate(zip(MIXES, prompts, strict=True)):
        merged = materialised(rounded, [(by_name[name], gate) for name, gate in gates.items()])
        assert harness.tokens(str(number)) == reference(merged, prompt, GREEDY.max_tokens)
    harness.assert_idle()


def test_int8_is_insisted_on_where_layers_cannot_be_compiled(folders):
    with pytest.raises(UnsupportedModelError, match="TWINSERVE_SHARED_WEIGHTS=int8"):
        Harness(folders["gpt2"], int8=True)


def test_a_lone_pattern_stays_in_factors(llama, plain_llama):
    expert = random_expert(plain_llama, "e0", seed=1, exact=False, only=inner)
    harness = Harness(llama, [expert], native="on", int8=True, mode="auto")
    assert harness.engine.merged is None


def test_the_setting_reaches_the_model():
    assert runtime_config(Settings(shared_weights="int8")).engine.model.int8
    assert not runtime_config(Settings()).engine.model.int8


def test_router_features_are_moved_back_to_those_of_the_exact_weights(llama, plain_llama):
    router = random_router(llama, ("e0", "e1"), layer=2, taps=(1,), pooling="mean_last")
    experts = [random_expert(plain_llama, f"e{i}", seed=i) for i in range(2)]
    harness = Harness(llama, experts, router=router, native="on", int8=True)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompts = [tuple(ids) for ids in render_prompts(tokenizer, neutral_prompts(tokenizer, 40, seed=1))]
    exact = extract_features(plain_llama, prompts, router.spec)

    def move() -> float:
        """Length of the mean difference."""
        found: list[torch.Tensor] = []
        for ids in prompts:
            harness.engine.ask(Question(ids, found.append, lambda: False))
        while harness.engine.busy:
            harness.engine.step()
        return float((torch.stack(found) - exact).mean(0).norm())

    corrected = move()
    harness.engine._correction = None
    assert corrected < 0.7 * move()


@pytest.mark.parametrize("int8", [True, False])
def test_only_rounded_weights_are_corrected_and_only_for_a_router(llama, plain_llama, int8):
    router = random_router(llama, ("e0",), layer=1)
    harness = Harness(
        llama, [random_expert(plain_llama, "e0", seed=0)], router=router, native="on", int8=int8
    )
    assert (harness.engine._correction is not None) == int8
    assert Harness(llama, [], native="on", int8=int8).engine._correction is None
