"""What is served on a processor: bfloat16, packed base weights, compiled layers or the model's own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.core import Pattern
from service.engine.layout import Chunk, Decode, PackLayout
from service.engine.model import Batch, ModelOptions, SharedModel
from service.gating import bank as bank_module
from tests.fixtures.tiny import ARCHITECTURES, VOCABULARY, Architecture, tiny_model
from tests.model.harness import materialised, prompt_ids, random_expert

CASES = [(name, "on") for name in ("llama", "qwen3", "gemma3")] + [(name, "off") for name in ARCHITECTURES]
GATES = [(0.75, 0.25), ()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model(name, root / name, seed=5) for name in ARCHITECTURES}


@pytest.mark.parametrize("pack_base", [True, False])
@pytest.mark.parametrize("fine_work", [0, 1 << 30], ids=["bfloat16 factors", "float32 factors"])
@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_bfloat16_logits_stay_near_the_float32_ground_truth(
    architecture, native, fine_work, pack_base, models, monkeypatch
):
    monkeypatch.setattr(bank_module, "_FINE_WORK", fine_work)
    path = models[architecture]
    plain = AutoModelForCausalLM.from_pretrained(path)
    experts = [random_expert(plain, f"e{i}", seed=i, ranks=(4, 2)) for i in range(2)]
    model = SharedModel(
        path,
        ModelOptions(kv_bytes=2**20, max_tokens=64, chunk_tokens=64, pack_base=pack_base, native=native),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        spec=None,
    )
    assert (model.native is not None) == (native == "on")
    residents = [model.bank.prepare(expert) for expert in experts]
    for resident in residents:
        model.bank.add(resident)
    patterns = [Pattern(tuple(zip([r.key for r in residents], gates, strict=False))) for gates in GATES]
    prompt = prompt_ids(1, 24, VOCABULARY)
    tables = [[[1 + 2 * row, 2 + 2 * row] for _ in model.cache.groups] for row in range(2)]
    batch = Batch(
        tokens=[*prompt, *prompt],
        positions=[*range(24), *range(24)],
        layout=PackLayout(chunks=(Chunk(0, 24, 0, tables[0]), Chunk(24, 48, 0, tables[1]))),
        kept=[23, 47],
        counts=[24, 24],
        keeps=[1, 1],
        patterns=patterns,
        lower=patterns,
    )
    forward = model.forward(batch)
    assert forward.gates.active == 2
    # These experts change embeddings and heads too, which are packed even where layers are compiled.
    assert model.bank.state.gates.fine == bool(fine_work)
    following = [int(logits.argmax()) for logits in forward.logits]
    step = Batch(
        tokens=following,
        positions=[24, 24],
        layout=PackLayout(decode=tuple(Decode(24, tables[row]) for row in range(2))),
        kept=[0, 1],
        counts=[1, 1],
        keeps=[1, 1],
        patterns=patterns,
        lower=patterns,
    )
    decoded = model.forward(step).logits.float()
    for row, gates in enumerate(GATES):
        reference = materialised(path, list(zip(experts, gates, strict=False)))
        with torch.inference_mode():
            expected = reference(torch.tensor([[*prompt, following[row]]])).logits[0, -2:]
        got = torch.stack([forward.logits[row].float(), decoded[row]])
        errors = (got - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.max() < 0.06, (row, errors)
