"""In which precisions a singular value can be bought, and what each loses of it.

A ladder is a list of rungs from the cheapest to the dearest. Rungs that never pay at a matrix's shape, for
another costs less for every part of the error it takes away, are left out, so that a greedy buyer who takes
one rung after the other is near the optimum (the lower convex hull of error against bytes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from experts.compression.spec import Codec
from experts.compression.stored import value_nbytes

RESIDUAL = {32: 0.0, 16: 1e-5, 8: 1.1e-4, 4: 0.018, 2: 0.21}
"""Bits → part of a singular value's energy that rounding both its vectors loses; measured on LoRA experts."""

_WIDTHS: dict[Codec, tuple[int, ...]] = {
    "bfloat16": (16,),
    "float16": (16,),
    "float32": (32,),
    "int8": (8,),
    "int4": (4,),
    "mixed": (2, 4, 8, 16),
}


@dataclass(frozen=True, slots=True)
class Rung:
    """One step up: what it adds to the rung below.

    Attributes:
        bits: precision reached.
        gain: part of the energy that is no longer lost.
        nbytes: bytes more.
    """

    bits: int
    gain: float
    nbytes: int


def widths(codec: Codec) -> tuple[int, ...]:
    """Bits that the codec can store a singular value in."""
    return _WIDTHS[codec]


def ladder(shape: tuple[int, int], bits: Sequence[int]) -> tuple[Rung, ...]:
    """The rungs worth climbing for a matrix of that shape, each with less gain per byte than the one before."""
    points = [(0, 1.0, 0)]
    for width in sorted(bits):
        point = (value_nbytes(shape, width), RESIDUAL[width], width)
        while len(points) > 1 and points[-1][0] >= point[0]:
            points.pop()  # scales can make a narrow code of a short vector the dearer one
        while len(points) > 1 and _slope(points[-1], point) >= _slope(points[-2], points[-1]):
            points.pop()
        points.append(point)
    return tuple(
        Rung(width, before[1] - residual, nbytes - before[0])
        for before, (nbytes, residual, width) in pairwise(points)
    )


def _slope(low: tuple[int, float, int], high: tuple[int, float, int]) -> float:
    """Error taken away for every byte more."""
    return (low[1] - high[1]) / (high[0] - low[0])
