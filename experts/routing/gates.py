"""Probabilities → gates: top-k, threshold, renormalise, quantise. Pure; called for every request."""

import math
from collections.abc import Sequence

from torch import Tensor

from experts.errors import RoutingError

QUANTUM = 1 / 64
"""Gates are multiples of this, so that near-equal requests share a routing pattern."""


def select_gates(
    probabilities: Tensor | Sequence[float],
    names: Sequence[str],
    top_k: int,
    threshold: float,
    quantum: float = QUANTUM,
) -> dict[str, float]:
    """The gates of one request, largest first; they sum to exactly 1, or none is left.

    Args:
        probabilities: (experts,) non-negative, the router's calibrated row.
        names: (experts,) in the same order.
        top_k: keep at most that many; equal probabilities keep the earlier name in `names`.
        threshold: drop probabilities below it. When none reaches it the result is empty, which means the
            shared expert alone.
        quantum: 1 / a whole number. Rounding is by largest remainder; a weight that rounds to 0 is dropped.

    Raises:
        RoutingError: lengths differ, a probability is negative or NaN, or a parameter is out of range.
    """
    row = probabilities.tolist() if isinstance(probabilities, Tensor) else list(probabilities)
    if len(row) != len(names):
        raise RoutingError(f"{len(row)} probabilities for {len(names)} experts; the router does not fit")
    if any(not math.isfinite(p) or p < 0 for p in row):
        raise RoutingError(f"the router gave a negative or non-finite probability: {row}")
    if top_k < 1:
        raise RoutingError(f"top_k {top_k} is below 1; use 1 or more")
    if not 0 <= threshold <= 1:
        raise RoutingError(f"threshold {threshold} is outside [0, 1]")
    units = round(1 / quantum) if 0 < quantum <= 1 else 0
    if units < 1 or not math.isclose(units * quantum, 1):
        raise RoutingError(f"quantum {quantum} is not 1 / a whole number; use for example 1/64")

    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    kept = [i for i in order if row[i] >= threshold and row[i] > 0]
    total = sum(row[i] for i in kept)
    if not kept or total <= 0:
        return {}
    exact = [row[i] / total * units for i in kept]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(kept)), key=lambda j: (counts[j] - exact[j], j))
    for j in by_remainder[: units - sum(counts)]:
        counts[j] += 1
    return {names[i]: count / units for i, count in zip(kept, counts, strict=True) if count}
