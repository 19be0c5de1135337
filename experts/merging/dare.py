"""DARE (arXiv 2311.03099): drop entries of a task vector at random and rescale the rest."""

from torch import Tensor

from experts.merging.draws import Draws, survivors


def dare(delta: Tensor, drop_rate: float, draws: Draws) -> Tensor:
    """Zero each entry with probability p, divide the others by 1 − p; the expectation stays δ.

    Args:
        delta: one tensor of one task vector, or the next rows of it, float32.
        drop_rate: p in [0, 1).
        draws: source of randomness.

    Returns:
        The sparsified task vector, the same shape.
    """
    if drop_rate == 0:
        return delta
    kept, rescale = survivors(drop_rate, draws.take(tuple(delta.shape)))
    return kept.mul_(delta).mul_(rescale)
