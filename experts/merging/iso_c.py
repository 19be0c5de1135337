"""Iso-C (arXiv 2502.04959): isotropic merging in the common subspace."""

from collections.abc import Sequence

import torch

from experts.factors import Delta, LowRank
from experts.merging.low_rank import total
from experts.merging.spectrum import spectrum


def iso_c(deltas: Sequence[Delta], scale: float) -> LowRank:
    """λ·σ̄·U·Vᵀ of the summed task matrix U·Σ·Vᵀ, σ̄ the mean of its singular values.

    The mean is over the singular values that are not zero, and only their vectors take part: those of zero
    singular values are arbitrary. For full fine-tunes that is the paper's; for products it is Iso-C in the
    core space of the factors (arXiv 2509.17786).

    Args:
        deltas: one matrix of each fine-tune that touches it, all (rows, columns), finite.
        scale: λ.

    Returns:
        θ* − θ₀, float32.
    """
    summed = spectrum(total(deltas, 1.0))
    mean = summed.values.mean() if len(summed.values) else torch.zeros((), dtype=torch.float64)
    return LowRank((summed.left * (mean * scale)).to(torch.float32), summed.right.to(torch.float32))
