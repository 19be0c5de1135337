"""Folders that PEFT and transformers themselves write, opened and compared with what those libraries compute."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from experts.checkpoint import Checkpoint, open_fine_tune, write_checkpoint
from experts.factors import LowRank, dense
from experts.merging import TaskArithmetic, merge

# Both libraries warn about choices that these tests make on purpose (Conv1D's orientation, tied weights).
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def llama(*, tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=32,
        intermediate_size=24,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, **special)
    )


def neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=32, intermediate_size=24
    )
    return GPTNeoXForCausalLM(config)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 4},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3},
        },
    ),
    "saved modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "every bias": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias of B": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "neox": (neox, {"target_modules": ["query_key_value", "dense_4h_to_h", "lm_head"]}),
}


def randomise(model: torch.nn.Module) -> None:
    """Train nothing, but let every trainable tensor differ from where PEFT starts it (B is zero there)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_base_plus_an_adapters_changes_computes_what_peft_computes(tmp_path: Path, case: str) -> None:
    make, options = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    names = {name for name, _ in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=5, **options))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    base = Checkpoint.open(tmp_path / "base")
    tuned = open_fine_tune("a", tmp_path / "adapter", base)
    assert set(base.names) == names
    materialised = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    parameters = dict(materialised.named_parameters())
    with torch.no_grad():
        for name in tuned.touched():
            delta = tuned.delta(name)
            assert delta is not None
            parameters[name] += dense(delta)
        ids = torch.arange(10)[None]
        expected = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(materialised(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert any(isinstance(tuned.delta(name), LowRank) for name in base.names)


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tied=True), gpt2, neox], ids=["llama", "tied", "gpt2", "neox"]
)
def test_a_written_model_loads_with_from_pretrained_and_computes_the_same(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    other = make()
    other.save_pretrained(tmp_path / "tuned")
    base = Checkpoint.open(tmp_path / "base")
    assert len(base.files) > 1
    tuned = open_fine_tune("a", tmp_path / "tuned", base)
    write_checkpoint(
        base, merge(base, [tuned], TaskArithmetic(scale=1)), tmp_path / "out", max_shard_bytes=4000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, other.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_stored_without_its_prefix_reads_under_the_architectures_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2()
    model.transformer.save_pretrained(tmp_path)
    config = model.config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert set(Checkpoint.open(tmp_path).names) == {name for name, _ in model.named_parameters()}
