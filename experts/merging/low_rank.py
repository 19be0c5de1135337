"""Linear combinations of task vectors that stay products where every term is one, whatever the ranks."""

from collections.abc import Sequence

import torch

from experts.factors import Delta, LowRank, dense
from experts.merging.task_arithmetic import task_arithmetic


def total(deltas: Sequence[Delta], weight: float) -> Delta:
    """weight · Σ δ_t.

    Args:
        deltas: at least one, all of one shape, float32; products may have different ranks.
        weight: factor of the sum.

    Returns:
        The product [up_1 … up_T]·weight times the stacked downs where all are products, else dense.
    """
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low_rank) < len(deltas):
        return task_arithmetic([dense(delta) for delta in deltas], weight)
    up = torch.cat([delta.up for delta in low_rank], dim=1)
    return LowRank(up * weight, torch.cat([delta.down for delta in low_rank], dim=0))
