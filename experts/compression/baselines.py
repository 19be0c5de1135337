"""Other compressions of a weight difference, for comparison at honest bytes; none of them is served.

Each is a function of one difference → (approximation, stored bytes), the bytes being those of a packed form
that an implementation could really store: codes, scales and indices, rounded up to whole bytes.
"""

import math

import torch
from torch import Tensor

from experts.errors import CompressionError
from experts.factors import Delta, dense

_SCALE_NBYTES, _SEED_NBYTES = 2, 8


def sparse(delta: Delta, density: float, value_bits: int = 16) -> tuple[Tensor, int]:
    """The largest entries by magnitude, with their places.

    Args:
        delta: (rows, columns) float32.
        density: fraction of entries kept, in (0, 1].
        value_bits: 16: float16 values. 1: signs only and one scale for all, the mean magnitude of what is
            kept (a ternary matrix, as in T-Switch, arXiv 2412.00054).

    Returns:
        The sparse matrix, dense in memory, and its bytes with the cheaper of two packed forms of the places.
    """
    if not 0 < density <= 1:
        raise CompressionError(f"density {density} is not a fraction; give a number in (0, 1]")
    if value_bits not in (1, 16):
        raise CompressionError(f"values of {value_bits} bits are not known; give 1 or 16")
    whole = dense(delta).to(torch.float32)
    count = max(1, round(density * whole.numel())) if whole.numel() else 0
    places = whole.abs().flatten().topk(count).indices
    kept = torch.zeros(whole.numel())
    values = whole.flatten()[places]
    if value_bits == 1:
        kept[places] = values.sign() * values.abs().mean().to(torch.float16).to(torch.float32)
    else:
        kept[places] = values.to(torch.float16).to(torch.float32)
    nbytes = sparse_nbytes(whole.numel(), count, value_bits)
    return kept.view(whole.shape), nbytes


def sparse_nbytes(size: int, count: int, value_bits: int) -> int:
    """Bytes of `count` of `size` entries: values, and a mask of one bit each or indices, whichever is less."""
    index_bits = math.ceil(math.log2(size)) if size > 1 else 0
    places = min(-(-size // 8), -(-count * index_bits // 8))
    scale = _SCALE_NBYTES if value_bits == 1 else 0
    return -(-count * value_bits // 8) + places + scale


def one_bit(delta: Delta) -> tuple[Tensor, int]:
    """Signs and one scale for the matrix, its mean magnitude (BitDelta without training, arXiv 2402.10193).

    Args:
        delta: (rows, columns) float32.
    """
    whole = dense(delta).to(torch.float32)
    scale = whole.abs().mean().to(torch.float16).to(torch.float32)
    return torch.where(whole < 0, -scale, scale), -(-whole.numel() // 8) + _SCALE_NBYTES


def dare(delta: Delta, density: float, seed: int) -> tuple[Tensor, int]:
    """A random part of the entries, rescaled so that the expectation stays (DARE, arXiv 2311.03099).

    Args:
        delta: (rows, columns) float32.
        density: fraction of entries kept, in (0, 1].
        seed: of the choice. The places follow from it, so that only values and seed are stored.
    """
    if not 0 < density <= 1:
        raise CompressionError(f"density {density} is not a fraction; give a number in (0, 1]")
    whole = dense(delta).to(torch.float32)
    count = max(1, round(density * whole.numel())) if whole.numel() else 0
    places = torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    kept = torch.zeros(whole.numel())
    rescaled = whole.flatten()[places] * (whole.numel() / max(count, 1))
    kept[places] = rescaled.to(torch.float16).to(torch.float32)
    return kept.view(whole.shape), dare_nbytes(count)


def dare_nbytes(count: int) -> int:
    """Bytes of `count` values and their seed."""
    return 2 * count + _SEED_NBYTES


def sparse_count(size: int, budget: int, value_bits: int) -> int:
    """Most entries that `sparse` can keep of `size` in so many bytes; 0 where not even one fits."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if sparse_nbytes(size, middle, value_bits) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
