"""The exact k-th largest magnitude of a vector that is only ever seen in pieces.

A first pass takes a sample, whose order says between which two magnitudes the k-th largest must lie; a
second one counts what is above and collects what is between. Should it lie outside after all, the second
pass is made again between wider bounds. Zeros are only counted, so that sparse vectors cost no memory.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_STRIDE = 61
"""One entry in so many is sampled; a prime, so that no column of a matrix is always or never met."""

_MARGIN = 0.002
"""How far the sample's quantile may be off, at first; far beyond the error of a sample of millions."""

Pieces = Callable[[], Iterable[Tensor]]
"""Gives a vector's pieces afresh, the same ones each time; float32, finite."""

_Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class MagnitudeSample:
    """What the first pass finds; the same for every density.

    Attributes:
        count: length of the vector.
        nonzero: how many of its entries are not zero.
        values: (n,) some of the magnitudes that are not zero, ascending.
    """

    count: int
    nonzero: int
    values: _Array


def magnitude_sample(pieces: Iterable[Tensor]) -> MagnitudeSample:
    """The first pass."""
    count = nonzero = 0
    samples = [np.zeros(0, dtype=np.float32)]
    for piece in pieces:
        flat = piece.numpy().reshape(-1)
        count += flat.size
        nonzero += int(np.count_nonzero(flat))
        samples.append(np.abs(flat[::_STRIDE]))
    values = np.concatenate(samples)
    values = values[values > 0]
    values.sort()
    return MagnitudeSample(count, nonzero, values)


def sampled_threshold(sample: MagnitudeSample, pieces: Pieces, density: float) -> float:
    """The second pass: smallest magnitude among the `density` fraction of largest entries.

    Args:
        sample: `magnitude_sample` of the same pieces.
        pieces: called once, rarely more often.
        density: fraction to keep, in (0, 1]; at least one entry is kept.

    Returns:
        t such that |x| >= t keeps ceil(density · n) entries, or more where several equal t. 0 for an
        empty vector.
    """
    # 0.07 · 100 is 7.000000000000001 in floating point; that is seven entries, not eight.
    wanted = max(1, math.ceil(density * sample.count * (1 - 1e-12)))
    if wanted > sample.nonzero:
        return 0.0
    margin = _MARGIN
    while True:
        low, high = _bounds(sample, wanted / sample.nonzero, margin)
        above, between = _between(pieces(), low, high)
        if above < wanted <= above + len(between):
            place = len(between) - (wanted - above)
            between.partition(place)
            return float(between[place])
        margin *= 16


def streamed_threshold(pieces: Pieces, density: float) -> float:
    """Both passes."""
    return sampled_threshold(magnitude_sample(pieces()), pieces, density)


def magnitude_threshold(vector: Tensor, density: float) -> float:
    """The same of a vector that is at hand."""
    magnitudes = vector.reshape(-1).abs().numpy()
    if not magnitudes.size:
        return 0.0
    place = magnitudes.size - max(1, math.ceil(density * magnitudes.size * (1 - 1e-12)))
    magnitudes.partition(place)
    return float(magnitudes[place])


def _bounds(sample: MagnitudeSample, share: float, margin: float) -> tuple[float, float]:
    """Magnitudes that should enclose the one with that share of the non-zero entries above or at it."""
    size = len(sample.values)
    lower, upper = math.floor(size * (1 - share - margin)) - 1, math.ceil(size * (1 - share + margin)) + 1
    low = float(sample.values[lower]) if 0 <= lower < size else 0.0
    high = float(sample.values[upper]) if 0 <= upper < size else math.inf
    return low, high


def _between(pieces: Iterable[Tensor], low: float, high: float) -> tuple[int, _Array]:
    """How many magnitudes are at least `high`, and those in [low, high) that are not zero."""
    above = 0
    between = [np.zeros(0, dtype=np.float32)]
    least, most = np.float32(low), np.float32(high)
    for piece in pieces:
        magnitudes = np.abs(piece.numpy().reshape(-1))
        reaching = magnitudes >= most
        above += int(np.count_nonzero(reaching))
        np.logical_xor(reaching, magnitudes >= least if low > 0 else magnitudes > 0, out=reaching)
        between.append(magnitudes[reaching])
    return above, np.concatenate(between)
