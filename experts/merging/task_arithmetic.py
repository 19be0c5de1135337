"""Task Arithmetic (arXiv 2212.04089): θ* = θ₀ + λ Σ δ_t."""

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(deltas: Sequence[Tensor], scale: float) -> Tensor:
    """λ times the sum of the task vectors.

    Args:
        deltas: one tensor of each fine-tune, all of one shape, float32.
        scale: λ.

    Returns:
        θ* − θ₀, the same shape.
    """
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total += delta
    return total * scale
