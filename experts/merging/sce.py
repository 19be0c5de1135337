"""SCE (arXiv 2408.07990, section 3.3): select, calculate, erase.

1. *Select* the entries of a tensor whose variance over the tasks is largest, zero the others.
2. *Calculate* each task's weight for the tensor: its share of the selected squares.
3. *Erase* the entries against the elected sign; the weights of those that stay are made to sum to one.
"""

import numpy as np
import torch
from torch import Tensor

from experts.merging.ties import elect_signs


def variance(deltas: Tensor) -> Tensor:
    """Variance over the tasks (population): (T, ...) float32 → (...)."""
    return (deltas - deltas.mean(0)).square_().mean(0)


def variance_threshold(variances: Tensor, density: float) -> float:
    """Smallest variance among the `density` fraction of largest ones that are not zero, rounded down.

    Infinity where that is no entry.
    """
    flat = variances.reshape(-1).clone().numpy()
    wanted = int(density * np.count_nonzero(flat) + 1e-6)
    if not wanted:
        return float("inf")
    flat.partition(len(flat) - wanted)
    return float(flat[len(flat) - wanted])


def select(deltas: Tensor, variances: Tensor, threshold: float) -> Tensor:
    """The task vectors (T, ...) with the entries zeroed whose variance (...) is below the threshold."""
    return deltas if threshold <= 0 else deltas * (variances >= threshold).to(deltas.dtype)


def energies(selected: Tensor) -> Tensor:
    """Sum of squares of each task's selected entries: (T, ...) → (T,) float64."""
    norms: Tensor = torch.linalg.vector_norm(selected.reshape(len(selected), -1), dim=1)
    return norms.to(torch.float64).square()


def erase(selected: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the selected entries that agree with the elected sign; 0 where none does.

    Args:
        selected: (T, ...) float32.
        weights: (T,), non-negative.

    Returns:
        (...) float32.
    """
    signs = elect_signs(selected)
    agreeing = (selected * signs).clamp_(min=0).reshape(len(selected), -1)
    weights = weights.to(selected.dtype)
    total = weights @ agreeing
    share = weights @ agreeing.sign_()
    # Where no task agrees, the total is zero too.
    share.clamp_(min=torch.finfo(share.dtype).tiny)
    return total.div_(share).view_as(signs).mul_(signs)


def sce(deltas: Tensor, density: float, scale: float) -> Tensor:
    """λ times the SCE-merged tensor.

    Args:
        deltas: (T, ...) one whole tensor of each fine-tune, float32.
        density: fraction of entries to select; 1 keeps all. One task has no variance and is kept whole.
        scale: λ.

    Returns:
        θ* − θ₀, (...).
    """
    variances = variance(deltas)
    every = density >= 1 or len(deltas) == 1
    selected = select(deltas, variances, 0.0 if every else variance_threshold(variances, density))
    return erase(selected, shares(energies(selected))).mul_(scale)


def shares(squares: Tensor) -> Tensor:
    """Weights of the tasks from their energies, (T,); equal where nothing was selected."""
    total = squares.sum()
    return squares / total if total > 0 else torch.full_like(squares, 1 / len(squares))
