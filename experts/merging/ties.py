"""TIES-Merging (arXiv 2306.01708): trim, elect sign, disjoint mean.

The paper trims each task vector as a whole. So the threshold comes in as an argument: over a model it is
found by a streaming pass (`threshold.py`), over a single tensor by `magnitude_threshold`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude reaches the threshold, zero the others (paper, step 1)."""
    if threshold <= 0:
        return delta
    # Hard shrinkage keeps what is strictly larger: than the number just below the threshold, as float32.
    below = torch.nextafter(torch.tensor(threshold, dtype=torch.float32), torch.tensor(-math.inf))
    return torch.nn.functional.hardshrink(delta, below.item())


def elect_signs(trimmed: Tensor) -> Tensor:
    """The sign with the larger total mass at each entry: sgn(Σ τ̂_t), 0 where they cancel (step 2).

    Args:
        trimmed: (T, ...) float32.

    Returns:
        (...), −1, 0 or 1.
    """
    return trimmed.sum(0).sign_()


def disjoint_mean(trimmed: Tensor, signs: Tensor) -> Tensor:
    """Mean over the non-zero entries that agree with the elected sign; 0 where none does (step 3).

    Args:
        trimmed: (T, ...) float32.
        signs: (...) of `elect_signs`.

    Returns:
        (...) float32.
    """
    agreeing = (trimmed * signs).clamp_(min=0)
    total = agreeing.sum(0).mul_(signs)
    return total.div_(agreeing.sign_().sum(0).clamp_(min=1))


def ties(deltas: Sequence[Tensor], thresholds: Sequence[float], scale: float) -> Tensor:
    """λ times the TIES-merged task vector.

    Args:
        deltas: one tensor of each fine-tune, all of one shape, float32.
        thresholds: for each of them the smallest magnitude that trimming keeps.
        scale: λ.

    Returns:
        θ* − θ₀, the same shape.
    """
    trimmed = torch.stack([trim(delta, least) for delta, least in zip(deltas, thresholds, strict=True)])
    return disjoint_mean(trimmed, elect_signs(trimmed)).mul_(scale)
