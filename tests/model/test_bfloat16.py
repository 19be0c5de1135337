"""What is served on a processor: bfloat16, packed base weights, float32 or bfloat16 factors by step size."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.core import Pattern
from service.engine.layout import Chunk, PackLayout
from service.engine.model import SharedModel
from service.gating import bank as bank_module
from tests.fixtures.tiny import ARCHITECTURES, VOCABULARY, tiny_model
from tests.model.harness import materialised, prompt_ids, random_expert


@pytest.mark.parametrize("pack_base", [True, False])
@pytest.mark.parametrize("fine_work", [0, 1 << 30], ids=["bfloat16 factors", "float32 factors"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_logits_stay_near_the_float32_ground_truth(
    architecture, fine_work, pack_base, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(bank_module, "_FINE_WORK", fine_work)
    path = tiny_model(architecture, tmp_path / "m", seed=5)
    plain = AutoModelForCausalLM.from_pretrained(path)
    experts = [random_expert(plain, f"e{i}", seed=i, ranks=(4, 2)) for i in range(2)]
    model = SharedModel(
        path,
        rows=2,
        max_tokens=64,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        spec=None,
        pack_base=pack_base,
    )
    keys = []
    for expert in experts:
        resident = model.bank.prepare(expert)
        model.bank.add(resident)
        keys.append(resident.key)
    prompt = prompt_ids(1, 24, VOCABULARY)
    mixes = [((keys[0], 0.75), (keys[1], 0.25)), ()]
    tokens = [*prompt, *prompt]
    layout = PackLayout(chunks=(Chunk(0, 24, 0, 0), Chunk(24, 48, 1, 0)))
    plan = model.bank.begin_step([Pattern(mix) for mix in mixes], [24, 24], [1, 1])
    assert plan.mode == "factored"
    assert model.bank.state.gates.fine == bool(fine_work)
    logits = model.forward(tokens, [*range(24), *range(24)], layout, [23, 47]).logits.float()
    for row, gates in enumerate(([0.75, 0.25], [])):
        reference = materialised(path, list(zip(experts, gates, strict=False)))
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0, -1]
        error = (logits[row] - expected).norm() / expected.norm()
        assert error < 0.06, (row, float(error))
