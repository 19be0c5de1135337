"""From fine-tunes on disk through merge, factors and bundle to tokens: equal to the fine-tune itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.compression import CompressionSpec
from experts.merging.methods import TaskArithmetic, Ties
from service.core import SamplingParams
from tests.fixtures.tiny import ARCHITECTURES, VOCABULARY, tiny_family
from tests.model.harness import Harness, materialised, prompt_ids, reference

SAMPLING = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
FULL_RANK = CompressionSpec(energy=1.0, dtype="float32", extras="exact")


def _generate(harness: Harness, gates: dict[str, float], seed: int) -> list[int]:
    harness.submit(f"r{seed}", prompt_ids(seed, 14, VOCABULARY), gates, SAMPLING)
    harness.run()
    return harness.tokens(f"r{seed}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_with_gate_one_is_the_fine_tune_itself(architecture, tmp_path: Path):
    family = tiny_family(
        tmp_path, architecture=architecture, experts=("alpha", "beta"), full=True, compression=FULL_RANK,
        method=TaskArithmetic(scale=0.4), router=False,
    )  # fmt: skip
    bundle = Bundle.open(family.bundle)
    harness = Harness(bundle.shared_path, [bundle.expert(name) for name in bundle.expert_names()])
    for seed, (name, folder) in enumerate(family.fine_tunes.items()):
        fine_tune = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = reference(fine_tune, prompt_ids(seed, 14, VOCABULARY), 12)
        assert _generate(harness, {name: 1.0}, seed) == expected


@pytest.mark.parametrize("method", [TaskArithmetic(scale=0.3), Ties(density=0.5, scale=0.8)])
def test_a_lora_at_full_rank_is_the_merged_adapter(method, tmp_path: Path):
    family = tiny_family(
        tmp_path, experts=("alpha", "beta"), compression=FULL_RANK, method=method, router=False
    )
    bundle = Bundle.open(family.bundle)
    harness = Harness(bundle.shared_path, [bundle.expert(name) for name in bundle.expert_names()])
    for seed, (name, folder) in enumerate(family.fine_tunes.items()):
        adapted = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32).eval()
        adapted.load_adapter(str(folder))
        assert _generate(harness, {name: 1.0}, seed) == reference(
            adapted, prompt_ids(seed, 14, VOCABULARY), 12
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_truncated_experts_mix_as_their_stored_factors_say(architecture, tmp_path: Path):
    family = tiny_family(
        tmp_path,
        architecture=architecture,
        full=True,
        compression=CompressionSpec(rank=3, dtype="bfloat16"),
        router=False,
    )
    bundle = Bundle.open(family.bundle)
    experts = {name: bundle.expert(name) for name in bundle.expert_names()}
    harness = Harness(bundle.shared_path, list(experts.values()))
    mix = {"alpha": 0.6, "beta": 0.3, "gamma": 0.1}
    model = materialised(bundle.shared_path, [(experts[name], gate) for name, gate in mix.items()])
    assert _generate(harness, mix, 5) == reference(model, prompt_ids(5, 14, VOCABULARY), 12)
