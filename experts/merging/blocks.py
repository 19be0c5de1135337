"""One parameter of all fine-tunes, a few rows at a time: entrywise methods then work within the cache.

A parameter is seen as rows of its last dimension; one without a second dimension is one row.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experts.factors import Delta, LowRank

_ENTRIES = 1 << 15
"""Entries of each task in a block: 128 KB. The same for any number of tasks, so that a product multiplied
out to find a threshold rounds as it does when it is merged."""


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows, all but the last a multiple of four rows."""
    rows, columns = as_rows(shape)
    step = max(4, _ENTRIES // max(columns, 1) // 4 * 4)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a parameter of any shape."""
    columns = shape[-1] if shape else 1
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    return rows, columns


def stacks(changes: Sequence[Delta | None], shape: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Block after block of every task's change.

    Args:
        changes: of one parameter, float32; None is zero.
        shape: the parameter's.

    Yields:
        The rows, and (T, rows, columns) float32 that is overwritten by the next block.
    """
    columns = as_rows(shape)[1]
    buffer: Tensor | None = None
    for rows in row_blocks(shape):
        count = rows.stop - rows.start
        if buffer is None:
            buffer = torch.zeros(len(changes), count, columns)
        stack = buffer[:, :count]
        for place, change in zip(stack, changes, strict=True):
            if change is not None:
                _write_rows(change, rows, place)
        yield rows, stack


def blocks(change: Delta) -> Iterator[Tensor]:
    """Block after block of one change, (rows, columns) float32, overwritten by the next."""
    for _, stack in stacks((change,), tuple(change.shape)):
        yield stack[0]


def whole(change: Delta) -> Tensor:
    """One change as (rows, columns), multiplied out as `stacks` does."""
    result = torch.empty(as_rows(tuple(change.shape)))
    for rows in row_blocks(tuple(change.shape)):
        _write_rows(change, rows, result[rows])
    return result


def _write_rows(change: Delta, rows: slice, place: Tensor) -> None:
    if isinstance(change, LowRank):
        torch.mm(change.up[rows], change.down, out=place)
    else:
        place.copy_(change.reshape(as_rows(tuple(change.shape)))[rows])
