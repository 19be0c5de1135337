"""Weight averaging (Model Soups, arXiv 2203.05482): θ* = mean of the fine-tunes."""

from collections.abc import Sequence

from torch import Tensor

from experts.merging.task_arithmetic import task_arithmetic


def average(deltas: Sequence[Tensor]) -> Tensor:
    """Mean of the task vectors: (1/T) Σ δ_t, which is the mean of the models minus θ₀.

    Args:
        deltas: one tensor of each fine-tune, all of one shape, float32; zeros where it is untouched.

    Returns:
        θ* − θ₀, the same shape.
    """
    return task_arithmetic(deltas, 1 / len(deltas))
