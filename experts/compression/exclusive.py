"""The exclusive vector of one parameter: v_t = δ_t − (θ* − θ₀) = θ_t − θ* (arXiv 2406.15479, eq. 2)."""

from experts.errors import CompressionError
from experts.factors import Delta, negative, summed


def exclusive_delta(task_delta: Delta | None, shared_delta: Delta | None) -> Delta | None:
    """δ_t minus the shared expert's change.

    Args:
        task_delta: θ_t − θ₀ of one parameter, float32; None where the fine-tune leaves it.
        shared_delta: θ* − θ₀ of the same; None where the merge leaves it.

    Returns:
        v_t; None where both are None. See `summed` for when it is a product.

    Raises:
        CompressionError: the two have different shapes.
    """
    if shared_delta is None:
        return task_delta
    if task_delta is None:
        return negative(shared_delta)
    if tuple(task_delta.shape) != tuple(shared_delta.shape):
        raise CompressionError(
            f"a task vector of shape {list(task_delta.shape)} cannot be set against a shared change of shape "
            f"{list(shared_delta.shape)}; are they of the same parameter?"
        )
    return summed((task_delta, negative(shared_delta)))
