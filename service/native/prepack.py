"""Base weights reordered once into the processor's preferred layout, behind one small seam.

oneDNN reorders a row-major weight on every call; on a small model that reorder is a large part of a
decode step. Its packing operators are private to torch, so everything here is probed first and any
surprise falls back to the plain layer. Nothing is packed off the CPU or in a dtype without a gain.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

LinearLike = nn.Linear | Conv1D
logger = logging.getLogger(__name__)

_TOKENS = 32
"""Tokens of a step that the layout is chosen for."""


def plain(module: LinearLike) -> Callable[[Tensor], Tensor]:
    """The layer's own product: (tokens, in) → (tokens, out), a fresh tensor."""
    weight, bias = module.weight, module.bias
    if isinstance(module, Conv1D):
        return lambda x: torch.addmm(bias, x, weight)
    return lambda x: F.linear(x, weight, bias)


def available() -> bool:
    """Whether torch's oneDNN packing operators exist and give the right answer for bfloat16."""
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    probe = nn.Linear(32, 48, dtype=torch.bfloat16)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    try:
        with torch.inference_mode():
            got = _packed(probe.weight, probe.bias)(x)
            return bool(torch.allclose(got.float(), probe(x).float(), atol=5e-2, rtol=5e-2))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        logger.info("oneDNN packing is not available here: %s", error)
        return False


def packed(module: LinearLike) -> Callable[[Tensor], Tensor]:
    """The same product as `plain` on a packed copy of the weight; only after `available()`."""
    weight = module.weight.t().contiguous() if isinstance(module, Conv1D) else module.weight
    return _packed(weight, module.bias)


def reorder(weight: Tensor) -> Tensor:
    """An (out, in) weight in the processor's layout, for oneDNN's own product only; after `available()`."""
    with torch.inference_mode():
        found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TOKENS)
        return found


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    reordered = reorder(weight)
    linear = torch.ops.mkldnn._linear_pointwise
    own_bias = None if bias is None else bias.detach()
    return lambda x: linear(x, reordered, own_bias, "none", [], "")
