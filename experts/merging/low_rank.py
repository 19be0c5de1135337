"""Linear combinations of task vectors that stay products where every term is one, whatever the ranks."""

from collections.abc import Sequence

from experts.factors import Delta, LowRank, summed


def total(deltas: Sequence[Delta], weight: float) -> Delta:
    """weight · Σ δ_t.

    Args:
        deltas: at least one, all of one shape, float32; products may have different ranks.
        weight: factor of the sum.

    Returns:
        The product [up_1 … up_T]·weight times the stacked downs where all are products and that is one of less
        than full rank, else dense.
    """
    whole = summed(deltas)
    return whole.scaled(weight) if isinstance(whole, LowRank) else whole.mul_(weight)
