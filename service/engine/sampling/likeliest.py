"""The largest entries of long rows, without sorting them: blocks that cannot hold one are passed over."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_BLOCK = 64
_SCAN = 256
"""A block of the plain maximum, which looks into one block only."""

_LAST_ID = 0xFFFFFFFF


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of every row and its first place; NaN counts as largest.

    Torch's own maximum with places is not vectorised on a CPU; that without places is.

    Args:
        logits: (rows, vocabulary) of any floating dtype.

    Returns:
        values (rows,) and ids (rows,) int64.
    """
    if logits.device.type != "cpu" or logits.shape[-1] % _SCAN:
        values, ids = logits.max(dim=-1)
        return values, ids
    blocks = logits.reshape(len(logits), -1, _SCAN)
    values, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks[torch.arange(len(blocks)), block].max(dim=-1).indices
    return values, block * _SCAN + inside


def likeliest(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of every row, largest first, equal ones by id.

    The order is the same on every device and in every batch, which `topk` alone does not promise; bfloat16
    logits are full of equal values.

    Args:
        values: (rows, vocabulary) float32 without NaN.
        count: at most the vocabulary.

    Returns:
        (rows, count) int64.
    """
    rows, size = values.shape
    if size <= 2 * count * _BLOCK:
        if values.device.type == "cpu":
            return torch.from_numpy(np.stack([_likeliest_of(row, count) for row in values.numpy()]))
        return _largest(_keys(values, torch.arange(size, device=values.device)), count)
    # A token outside the first `count` blocks, ordered by maximum and place, has `count` better ones.
    padding = -size % _BLOCK
    padded = functional.pad(values, (0, padding), value=float("-inf")) if padding else values
    maxima = padded.reshape(rows, -1, _BLOCK).amax(dim=-1)
    block = _largest(_keys(maxima, torch.arange(maxima.shape[-1], device=values.device)), count)
    ids = (block[..., None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(-2)
    return _largest(_keys(padded.gather(-1, ids), ids), count)


def _likeliest_of(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The same for one row (vocabulary,) on a CPU: keys only for what reaches the `count`th value."""
    place = len(row) - count
    reaching = row >= np.partition(row, place)[place] if 0 < place < len(row) else np.ones(len(row), bool)
    ids = np.flatnonzero(reaching)
    bits = row[ids].view(np.int32).astype(np.int64)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (_LAST_ID - ids)
    keys.sort()
    return _LAST_ID - (keys[len(keys) - count :][::-1] & _LAST_ID)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose order is that of the float32 values, then that of the ids backwards."""
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_LAST_ID - ids)


def _largest(keys: Tensor, count: int) -> Tensor:
    """Ids of the largest keys, (rows, count). On a CPU numpy selects and sorts ten times as fast as torch."""
    if keys.device.type != "cpu":
        return _LAST_ID - (keys.topk(count, dim=-1).values & _LAST_ID)
    largest = keys.numpy()
    if 0 < count < largest.shape[-1]:
        largest = np.partition(largest, largest.shape[-1] - count, axis=-1)
    largest = np.sort(largest[:, largest.shape[-1] - count :], axis=-1)
    return _LAST_ID - (torch.from_numpy(largest[:, ::-1].copy()) & _LAST_ID)
