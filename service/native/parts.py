"""Which pieces of an HF model the compiled decoder needs, found by structure and checked by numbers.

Recognised: pre-norm decoder layers with RMS norms, grouped-query attention with rotated halves and
optional norms of query and key heads, a gated MLP, optional norms behind either half (Llama, Mistral, Qwen2,
Qwen3, Gemma3, SmolLM, …). Structure alone is not trusted: `decoder.py` compares one pass with the model's own.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "after_attention", "before_mlp", "after_mlp", "query", "key")

_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_PLAIN_NORMS = {"input": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "input": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: F.gelu(x, approximate="tanh"))
"""In the order of the kernel's enumeration."""


class UnrecognisedError(Exception):
    """The model's layers are not of the recognised kind; the message says where."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One decoder layer.

    Attributes:
        path: dotted name of the layer.
        matrices: name of `MATRICES` → (dotted name, module).
        scales: name of `NORMS` → (dotted name, (dim,) float32 scale), those that exist.
        rope: index of its rotation table.
    """

    path: str
    matrices: dict[str, tuple[str, nn.Linear]]
    scales: dict[str, tuple[str, Tensor]]
    epsilon: float
    rope: int


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """All decoder layers and what stands around them.

    Attributes:
        ropes: (cosine, sine) of shape (positions, rotary) float32.
        activation: index of the MLP's activation in the kernel's enumeration.
        norm: what the hidden states pass before the head.
    """

    layers: tuple[LayerParts, ...]
    ropes: tuple[tuple[Tensor, Tensor], ...]
    activation: Literal[0, 1]
    embedding: nn.Module
    norm: nn.Module
    head: nn.Module

    @property
    def modules(self) -> dict[str, nn.Linear]:
        """Weight's parameter name → its linear layer, for every matrix of every layer."""
        return {f"{path}.weight": module for layer in self.layers for path, module in layer.matrices.values()}


@torch.inference_mode()
def find_parts(model: PreTrainedModel, positions: int) -> DecoderParts:
    """Take a model apart.

    Args:
        positions: length of the rotation tables.

    Raises:
        UnrecognisedError: a layer has another structure.
    """
    base = model.base_model
    stack, norm = getattr(base, "layers", None), getattr(base, "norm", None)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(stack, nn.ModuleList) or norm is None or head is None or not len(stack):
        raise UnrecognisedError(f"{type(model).__name__} has no list of layers between embedding and norm")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config.get_text_config(), name, None) not in (None, 1, 1.0):
            raise UnrecognisedError(f"{type(model).__name__} changes its logits behind the head ({name})")
    tables, ropes = _ropes(model, stack, positions)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise UnrecognisedError(f"{type(model).__name__} mixes {', '.join(sorted(map(str, dtypes)))}")
    prefix = next(name for name, module in model.named_modules() if module is stack)
    layers = tuple(
        _layer(f"{prefix}.{index}", layer, tables[index]) for index, layer in enumerate(stack.children())
    )
    return DecoderParts(layers, ropes, _activation(stack[0]), embedding, norm, head)


def _layer(path: str, layer: nn.Module, rope: int) -> LayerParts:
    matrices = {}
    for name, place in _PATHS.items():
        module = _module(layer, place)
        if type(module) is not nn.Linear:
            raise UnrecognisedError(f"{path} has no plain linear layer {place}")
        matrices[name] = (f"{path}.{place}", module)
    sandwich = _module(layer, "pre_feedforward_layernorm") is not None
    norms = dict(_SANDWICH_NORMS if sandwich else _PLAIN_NORMS)
    norms |= {name: place for name, place in _HEAD_NORMS.items() if _module(layer, place) is not None}
    scales, epsilons = {}, set()
    for name, place in norms.items():
        module = _module(layer, place)
        if module is None:
            raise UnrecognisedError(f"{path} has no {place}")
        scale, epsilon = _scale(f"{path}.{place}", module)
        scales[name] = (f"{path}.{place}", scale)
        epsilons.add(epsilon)
    if len(epsilons) != 1:
        raise UnrecognisedError(f"the norms of {path} differ in epsilon")
    known = {id(module) for _, module in matrices.values()}
    known |= {id(_module(layer, place)) for place in norms.values()}
    for name, module in layer.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and id(module) not in known:
            raise UnrecognisedError(f"{path}.{name} has parameters of its own")
    return LayerParts(path, matrices, scales, epsilons.pop(), rope)


def _scale(path: str, norm: nn.Module) -> tuple[Tensor, float]:
    """(dim,) float32 factor on the normalised input, and epsilon; found by trying what the module does."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or epsilon is None or getattr(norm, "bias", None) is not None:
        raise UnrecognisedError(f"{path} is no RMS norm")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[0], generator=generator).to(weight.dtype)
    wide = x.to(torch.float32)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + float(epsilon))
    got = norm(x).to(torch.float32)
    for scale in (weight.to(torch.float32), 1.0 + weight.to(torch.float32)):
        if torch.allclose(got, normalised * scale, atol=2e-2, rtol=2e-2):
            return scale.clone(), float(epsilon)
    raise UnrecognisedError(f"{path} does something else than an RMS norm")


def _activation(layer: nn.Module) -> Literal[0, 1]:
    act = _module(layer, "mlp.act_fn")
    x = torch.linspace(-4, 4, 33)
    if act is not None:
        for index, known in enumerate(_ACTIVATIONS):
            if torch.allclose(act(x), known(x), atol=1e-5):
                return index  # type: ignore[return-value]
    raise UnrecognisedError("the MLP's activation is neither SiLU nor GELU (tanh)")


def _ropes(
    model: PreTrainedModel, stack: nn.ModuleList, positions: int
) -> tuple[list[int], tuple[tuple[Tensor, Tensor], ...]]:
    """Each layer's table index, and the tables: what the model itself hands its layers at every position."""
    given: list[Any] = []
    with _recording(stack, given):
        ids = torch.zeros(1, positions, dtype=torch.long, device=model.device)
        model(
            input_ids=ids,
            position_ids=torch.arange(positions, device=model.device)[None],
            use_cache=False,
            logits_to_keep=1,
        )
    tables: list[int] = []
    ropes: list[tuple[Tensor, Tensor]] = []
    for pair in given:
        if not isinstance(pair, tuple) or len(pair) != 2 or pair[0].shape[:2] != (1, positions):
            raise UnrecognisedError("the layers get no rotation of one angle a position")
        cosine, sine = (table[0].to(torch.float32).contiguous() for table in pair)
        found = next((i for i, known in enumerate(ropes) if torch.equal(known[0], cosine)), None)
        if found is None:
            found = len(ropes)
            ropes.append((cosine, sine))
        tables.append(found)
    if len(tables) != len(stack):
        raise UnrecognisedError("not every layer was reached")
    return tables, tuple(ropes)


@contextmanager
def _recording(stack: nn.ModuleList, given: list[Any]) -> Any:
    """Layers pass their input on and note the rotation that they were given."""

    def note(hidden: Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
        given.append(position_embeddings)
        return hidden

    layers = list(stack.children())
    for layer in layers:
        layer.forward = note
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _module(root: nn.Module, path: str) -> nn.Module | None:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None
