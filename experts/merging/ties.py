"""TIES-Merging (arXiv 2306.01708): trim, elect sign, disjoint mean.

The paper trims each task vector as a whole. So the threshold comes in as an argument: over a model it is
found by a streaming pass (`threshold.py`), over a single tensor by `magnitude_threshold`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude reaches the threshold, zero the others (paper, step 1)."""
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def elect_signs(trimmed: Sequence[Tensor]) -> Tensor:
    """The sign with the larger total mass at each entry: sgn(Σ τ̂_t), 0 where they cancel (step 2)."""
    total = torch.zeros_like(trimmed[0])
    for vector in trimmed:
        total += vector
    return total.sign()


def disjoint_mean(trimmed: Sequence[Tensor], signs: Tensor) -> Tensor:
    """Mean over the non-zero entries that agree with the elected sign; 0 where none does (step 3)."""
    total = torch.zeros_like(signs)
    count = torch.zeros_like(signs)
    for vector in trimmed:
        agrees = (vector.sign() == signs) & (signs != 0)
        total += torch.where(agrees, vector, 0.0)
        count += agrees
    return total / count.clamp_(min=1)


def ties(deltas: Sequence[Tensor], thresholds: Sequence[float], scale: float) -> Tensor:
    """λ times the TIES-merged task vector.

    Args:
        deltas: one tensor of each fine-tune, all of one shape, float32.
        thresholds: for each of them the smallest magnitude that trimming keeps.
        scale: λ.

    Returns:
        θ* − θ₀, the same shape.
    """
    trimmed = [trim(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]
    return disjoint_mean(trimmed, elect_signs(trimmed)) * scale
