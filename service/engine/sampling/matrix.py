"""Rows of a logits matrix: which to take, and how many at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ENTRIES = 1 << 20
"""Logits of one float32 matrix on a CPU. Larger ones leave the cache, and the allocator hands their memory
back and maps it anew every time, which takes longer than the arithmetic. Elsewhere it bounds memory only."""

_ENTRIES_ELSEWHERE = 1 << 26


def taken(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows, in ascending order; no copy where they lie next to each other."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return matrix[first : last + 1]
    return matrix[torch.tensor(rows, device=matrix.device)]


def spans(count: int, matrix: Tensor) -> Iterator[slice]:
    """Cut `count` rows as wide as the matrix into pieces that are worked on together."""
    entries = _ENTRIES if matrix.device.type == "cpu" else _ENTRIES_ELSEWHERE
    size = max(1, entries // matrix.shape[-1])
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
