"""Promises of the weaker base, on a random Llama of a few thousand parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experts.embedded.weaker import layer_influence, least_influential, remove_layers
from experts.errors import CheckpointError


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def make_idle(layer: Any) -> None:
    """Let a layer give back its input: nothing is added to the residual stream."""
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first() -> None:
    model = tiny_llama()
    make_idle(model.model.layers[2])
    influence = layer_influence(model, [[1, 5, 9], [3, 4]])
    assert len(influence) == 4
    assert influence[2] == pytest.approx(0.0, abs=1e-6)
    assert least_influential(influence, 1) == [2]


def test_removing_idle_layers_leaves_the_logits_as_they_were(tmp_path: Path) -> None:
    model = tiny_llama()
    make_idle(model.model.layers[1])
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        before = model(ids).logits
        remove_layers(model, [1])
        torch.testing.assert_close(model(ids).logits, before)
    assert model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_a_shortened_model_saves_as_an_ordinary_folder_and_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    remove_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] <= 8


@pytest.mark.parametrize("count", [0, 3, -1])
def test_removing_no_layer_or_all_is_refused(count: int) -> None:
    with pytest.raises(CheckpointError, match="cannot remove"):
        least_influential([0.1, 0.2, 0.3], count)
