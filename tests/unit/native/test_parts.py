"""A model is taken apart only if every piece is what the kernels compute; otherwise the reason is told."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from service.core import Pattern
from service.engine.layout import Chunk, PackLayout
from service.engine.model import Batch, ModelOptions, SharedModel
from service.native.decoder import AttentionShape, NativeDecoder
from service.native.parts import UnrecognisedError, find_parts
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _llama(**more) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES | more)).eval()


class _Scaled(nn.Module):
    """A linear layer in other clothes."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class _Shifted(nn.Module):
    """Calls itself a norm and is none."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return x * self.weight


def _other_linear(model) -> None:
    model.model.layers[1].mlp.up_proj = _Scaled(model.model.layers[1].mlp.up_proj)


def _other_norm(model) -> None:
    model.model.layers[0].input_layernorm = _Shifted(model.model.layers[0].input_layernorm)


def _norm_with_bias(model) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(32)


def _missing_norm(model) -> None:
    model.model.layers[0].post_attention_layernorm = None


def _own_parameter(model) -> None:
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)


def _two_epsilons(model) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-2


def _no_layers(model) -> None:
    model.model.layers = nn.ModuleList()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_linear, "no plain linear layer mlp.up_proj"),
        (_other_norm, "something else than an RMS norm"),
        (_norm_with_bias, "is no RMS norm"),
        (_missing_norm, "has no post_attention_layernorm"),
        (_own_parameter, r"mlp\.extra has parameters of its own"),
        (_two_epsilons, "differ in epsilon"),
        (_no_layers, "no list of layers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, reason):
    model = _llama()
    find_parts(model, 8)
    change(model)
    with pytest.raises(UnrecognisedError, match=reason):
        find_parts(model, 8)


def test_another_activation_is_refused():
    with pytest.raises(UnrecognisedError, match="activation"):
        find_parts(_llama(hidden_act="relu"), 8)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_other_families_are_refused(architecture, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, tmp_path / "m"))
    with pytest.raises(UnrecognisedError):
        find_parts(model, 8)


def test_taking_a_model_apart_leaves_it_whole():
    model = _llama()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    parts = find_parts(model, 32)
    assert torch.equal(model(ids).logits, before)
    assert [layer.path for layer in parts.layers] == ["model.layers.0", "model.layers.1"]
    assert len(parts.ropes) == 1
    assert parts.ropes[0][0].shape == (32, 8)


def _attention(count: int = 2, **more) -> list[AttentionShape]:
    return [
        AttentionShape(**{"heads": 4, "key_heads": 2, "dim": 8, "scale": 0.3, "window": None} | more)
    ] * count


def test_layers_of_other_sizes_never_reach_the_kernels():
    model = _llama()
    layer = model.model.layers[1].mlp
    for name, size in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
        setattr(layer, name, nn.Linear(*size, bias=False))
    parts = find_parts(model, 8)
    with pytest.raises(UnrecognisedError, match=r"layers\.1\.mlp\.gate_proj is 64 x 32"):
        NativeDecoder(parts, _attention(), pack=False)


@pytest.mark.parametrize("wrong", [{"heads": 8}, {"key_heads": 4}, {"dim": 4}])
def test_matrices_that_do_not_fit_the_heads_never_reach_the_kernels(wrong):
    parts = find_parts(_llama(), 8)
    with pytest.raises(UnrecognisedError, match="as heads and first layer say"):
        NativeDecoder(parts, _attention(**wrong), pack=False)
    with pytest.raises(UnrecognisedError, match="differ from the first layer's"):
        NativeDecoder(parts, [*_attention(1), *_attention(1, **wrong)], pack=False)


def test_what_looks_alike_and_computes_otherwise_runs_as_transformers_wrote_it(tmp_path, caplog):
    config = GraniteConfig(
        **SIZES, residual_multiplier=0.3, embedding_multiplier=4.0, attention_multiplier=0.2, logits_scaling=1.0,
        bos_token_id=0, eos_token_id=2, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    path = tmp_path / "m"
    GraniteForCausalLM(config).save_pretrained(path)
    tiny_tokenizer(path)
    with caplog.at_level("INFO", "service.engine.model"):
        model = SharedModel(
            path,
            ModelOptions(kv_bytes=2**18, max_tokens=64, chunk_tokens=64),
            dtype=torch.float32,
            device=torch.device("cpu"),
            spec=None,
        )
    assert model.native is None
    assert "compiled logits differ from the model's own" in caplog.text
    ids = list(range(20))
    batch = Batch(
        tokens=ids, positions=ids, layout=PackLayout(chunks=(Chunk(0, 20, 0, [[1, 2]]),)), kept=ids,
        counts=[20], keeps=[20], patterns=[Pattern()], lower=[Pattern()],
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.forward(batch).logits, expected, rtol=1e-4, atol=1e-4)
