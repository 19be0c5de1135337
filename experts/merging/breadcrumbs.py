"""Model Breadcrumbs (arXiv 2312.06795): mask each tensor's largest outliers and its small entries."""

import numpy as np
from torch import Tensor

from experts.merging.ties import trim


def breadcrumbs(delta: Tensor, least: float, most: float) -> Tensor:
    """Keep the entries whose magnitude is in [least, most), zero the others.

    Args:
        delta: one tensor of one task vector, or some of it, float32.
        least: smallest magnitude that is kept.
        most: smallest magnitude that is an outlier; infinity for none.

    Returns:
        The masked task vector, the same shape.
    """
    kept = trim(delta, least)
    return kept if most == float("inf") else kept - trim(delta, most)


def breadcrumb_bounds(delta: Tensor, density: float, outliers: float) -> tuple[float, float]:
    """The magnitudes between which a `density` fraction of the tensor lies, below an `outliers` fraction.

    Args:
        delta: the whole tensor of one task vector, float32.
        density: fraction to keep, in (0, 1]; counts are rounded down.
        outliers: fraction of the largest magnitudes to mask, in [0, 1 − density].

    Returns:
        (least, most) for `breadcrumbs`.
    """
    magnitudes = delta.reshape(-1).abs().numpy()
    count = len(magnitudes)
    masked = int(outliers * count + 1e-6)
    kept = max(1, min(int(density * count + 1e-6), count - masked))
    lowest = count - masked - kept
    if density >= 1 or not count:
        return 0.0, float("inf")
    magnitudes.partition(lowest)
    least = float(magnitudes[lowest])
    if not masked:
        return least, float("inf")
    upper: np.ndarray[tuple[int], np.dtype[np.float32]] = magnitudes[lowest:]
    upper.partition(kept)
    return least, float(upper[kept])
