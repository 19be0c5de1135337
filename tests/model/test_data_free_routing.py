"""A data-free router reads every layer; the engine reads them as plain transformers does, and its word holds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.routing import FeatureSpec, extract_features, select_gates
from experts.routing.subspace import SubspaceRouter
from service.core import SamplingParams
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, prompt_ids, random_expert

NAMES = ("e0", "e1", "e2")
SPEC = FeatureSpec(layer=3, taps=(1, 2))
PROMPTS = [prompt_ids(70 + i, 6 + 5 * i, VOCABULARY) for i in range(6)]


@pytest.mark.parametrize("native", ["on", "off"])
def test_what_it_reads_in_the_engine_gives_the_gates_of_plain_features(native, tmp_path: Path):
    path = tiny_model("llama", tmp_path / "m", seed=6, num_hidden_layers=4)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    experts = [random_expert(plain, name, seed=i) for i, name in enumerate(NAMES)]
    neutral = [prompt_ids(200 + i, 4 + i % 9, VOCABULARY) for i in range(40)]
    generator = torch.Generator().manual_seed(1)
    hidden = plain.config.hidden_size
    rows = {name: torch.randn(3, 2, 4, hidden, generator=generator) for name in NAMES}
    router = SubspaceRouter.of(rows, extract_features(plain, neutral, SPEC), SPEC, rate=0.5)
    harness = Harness(path, experts, router=router, native=native)
    for i, prompt in enumerate(PROMPTS):
        harness.submit(f"r{i}", prompt, None, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    harness.run()
    features = extract_features(plain, PROMPTS, SPEC)
    found, silent = router.probabilities(features), router.abstains(features)
    for i in range(len(PROMPTS)):
        outcome = harness.finished(f"r{i}").routing
        assert outcome.scores == pytest.approx(dict(zip(NAMES, found[i].tolist(), strict=True)), abs=1e-3)
        gates = select_gates(found[i], router.names, router.top_k, router.threshold)
        assert outcome.gates == ({} if silent[i] else gates)
    harness.assert_idle()
