"""The exact k-th largest magnitude of a vector that is only ever seen in pieces.

The bits of a non-negative float32, read as an integer, order as the numbers do. So one pass over the
pieces counts the upper bits and finds the bin of the k-th largest, a second one counts the lower bits
inside that bin: exact, in 512 KB, whatever the vector's length.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_LOW_BITS = 15
_HIGH_BINS = 1 << (31 - _LOW_BITS)
_LOW_BINS = 1 << _LOW_BITS


def streamed_threshold(pieces: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Smallest magnitude among the `density` fraction of largest entries.

    Args:
        pieces: gives the vector's pieces afresh, the same ones each time; called twice. float32, finite.
        density: fraction to keep, in (0, 1]; at least one entry is kept.

    Returns:
        t such that |x| >= t keeps ceil(density · n) entries, or more where several equal t. 0 for an
        empty vector.
    """
    high = torch.zeros(_HIGH_BINS, dtype=torch.int64)
    for piece in pieces():
        high += torch.bincount(_bits(piece) >> _LOW_BITS, minlength=_HIGH_BINS)
    total = int(high.sum())
    if total == 0:
        return 0.0
    # 0.07 · 100 is 7.000000000000001 in floating point; that is seven entries, not eight.
    wanted = max(1, math.ceil(density * total * (1 - 1e-12)))
    chosen, wanted = _bin_from_above(high, wanted)
    low = torch.zeros(_LOW_BINS, dtype=torch.int64)
    for piece in pieces():
        bits = _bits(piece)
        low += torch.bincount(bits[(bits >> _LOW_BITS) == chosen] & (_LOW_BINS - 1), minlength=_LOW_BINS)
    exact, _ = _bin_from_above(low, wanted)
    return torch.tensor([(chosen << _LOW_BITS) | exact], dtype=torch.int32).view(torch.float32).item()


def magnitude_threshold(vector: Tensor, density: float) -> float:
    """`streamed_threshold` of a vector that is at hand."""
    return streamed_threshold(lambda: (vector,), density)


def _bits(piece: Tensor) -> Tensor:
    """Magnitudes as order-preserving integers, (n,) int32."""
    return piece.to(torch.float32).reshape(-1).abs().view(torch.int32)


def _bin_from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the wanted-th entry counted from the top, and its place among that bin's."""
    above = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(above, wanted))
    before = int(above[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, wanted - before
