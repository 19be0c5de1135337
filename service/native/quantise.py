"""Weights as int8 with one scale a row (absmax, symmetric), in the panels that the compiled product reads."""

import torch
from torch import Tensor

from service.native.parts import UnrecognisedError

_PANEL_ROWS = 16
_PANEL_DEPTH = 32
"""kernels.h, kPanelRows and kPanelDepth."""

_LARGEST = 127


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floating point → (out, in) int8 and (out,) float32 scales: weight ≈ int8 · scale, row by row.

    A row of zeros has scale 0.

    Raises:
        UnrecognisedError: NaN or Inf in the weight.
    """
    wide = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        raise UnrecognisedError("a weight has NaN or Inf and cannot be quantised")
    scales = wide.abs().amax(1) / _LARGEST
    steps = wide / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantised(weight: Tensor) -> Tensor:
    """What `quantise` keeps of a weight, (out, in) float32."""
    steps, scales = quantise(weight)
    return steps.to(torch.float32) * scales[:, None]


def panels(steps: Tensor) -> Tensor:
    """(out, in) int8 → (panels, depth / 2, 16, 2): sixteen rows side by side, input in pairs, zeros at the ends."""
    out, inside = steps.shape
    padded = torch.nn.functional.pad(steps, (0, -inside % _PANEL_DEPTH, 0, -out % _PANEL_ROWS))
    cut = padded.view(-1, _PANEL_ROWS, padded.shape[1] // 2, 2)
    return cut.transpose(1, 2).contiguous()
