"""DELLA's MagPrune (arXiv 2406.11617): drop entries by the rank of their magnitude, rescale the rest.

The other steps of DELLA, sign election and fusing, are those of TIES (`ties.py`).
"""

import numpy as np
import torch
from torch import Tensor

from experts.merging.draws import Draws, survivors


def magprune(delta: Tensor, drop_rate: float, epsilon: float, draws: Draws) -> Tensor:
    """Zero entries with probability p_i, divide the others by 1 − p_i; the expectation stays δ.

    p_i falls evenly from p + ε/2 at the smallest magnitude of a row to p − ε/2 at the largest. Equal
    magnitudes are ranked by their place.

    Args:
        delta: one tensor of one task vector, or the next rows of it, float32; (rows, columns) or (n,), one row.
        drop_rate: p.
        epsilon: ε.
        draws: source of randomness.

    Returns:
        The sparsified task vector, the same shape.
    """
    if drop_rate == 0:
        return delta
    rows = delta.reshape(-1, delta.shape[-1])
    columns = rows.shape[1]
    rates = torch.linspace(drop_rate + epsilon / 2, drop_rate - epsilon / 2, columns, dtype=torch.float64)
    if columns == 1:
        rates.fill_(drop_rate)
    kept, rescale = survivors(rates, draws.take(tuple(rows.shape)))
    factors = torch.empty_like(rows).scatter_(1, by_magnitude(rows), kept.mul_(rescale))
    return factors.mul_(rows).reshape(delta.shape)


def by_magnitude(rows: Tensor) -> Tensor:
    """Places of each row's entries in ascending order of magnitude, (rows, columns) int64.

    The bits of a non-negative float32 order as the numbers do, so magnitude and place make one integer
    that NumPy sorts several times faster than any argsort.
    """
    width = max(1, (rows.shape[1] - 1).bit_length())
    keys = rows.abs().view(torch.int32).to(torch.int64)
    keys.bitwise_left_shift_(width).bitwise_or_(torch.arange(rows.shape[1]))
    ordered: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = keys.numpy()
    ordered.sort(axis=1)
    return keys.bitwise_and_((1 << width) - 1)
