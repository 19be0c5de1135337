"""The exclusive vector of one parameter: v_t = δ_t − (θ* − θ₀) = θ_t − θ* (arXiv 2406.15479, eq. 2)."""

import torch

from experts.errors import CompressionError
from experts.factors import Delta, LowRank, dense


def exclusive_delta(task_delta: Delta | None, shared_delta: Delta | None) -> Delta | None:
    """δ_t minus the shared expert's change; low-rank stays low-rank.

    Args:
        task_delta: θ_t − θ₀ of one parameter, float32; None where the fine-tune leaves it.
        shared_delta: θ* − θ₀ of the same; None where the merge leaves it.

    Returns:
        v_t; `LowRank` where both are (or are None); None where both are None.

    Raises:
        CompressionError: the two have different shapes.
    """
    if shared_delta is None:
        return task_delta
    if task_delta is None:
        return shared_delta.scaled(-1.0) if isinstance(shared_delta, LowRank) else -shared_delta
    if tuple(task_delta.shape) != tuple(shared_delta.shape):
        raise CompressionError(
            f"a task vector of shape {list(task_delta.shape)} cannot be set against a shared change of shape "
            f"{list(shared_delta.shape)}; are they of the same parameter?"
        )
    if isinstance(task_delta, LowRank) and isinstance(shared_delta, LowRank):
        return LowRank(
            torch.cat([task_delta.up, -shared_delta.up], dim=1),
            torch.cat([task_delta.down, shared_delta.down], dim=0),
        )
    return dense(task_delta) - dense(shared_delta)
