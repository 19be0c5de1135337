"""Model Stock (arXiv 2403.19522): how far to go from the base to the average, from the fine-tunes' angle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.factors import Delta, LowRank, dense


def model_stock_ratio(products: Tensor, count: int) -> float:
    """t = T·cos θ / (1 + (T − 1)·cos θ), cos θ the mean over the pairs of task vectors (paper, eq. 2 and 6).

    The paper's fine-tunes are of one task and at acute angles; where the mean is obtuse the formula leaves
    the segment from base to average, and t is 0. One fine-tune comes back whole.

    Args:
        products: inner products of the task vectors that are not zero, (n, n).
        count: T >= n; the T − n others are zero, and at right angles to any.

    Returns:
        t in [0, 1].
    """
    if count == 1:
        return 1.0
    norms = products.diagonal().clamp(min=0).sqrt()
    scaled = products / torch.outer(norms, norms).clamp(min=torch.finfo(products.dtype).tiny)
    cosine = float(scaled.fill_diagonal_(0).sum()) / (count * (count - 1))
    return 0.0 if cosine <= 0 else count * cosine / (1 + (count - 1) * cosine)


def inner_products(deltas: Sequence[Delta]) -> Tensor:
    """⟨δ_s, δ_t⟩ of one tensor's task vectors, (T, T) float64; of products without multiplying them out."""
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low_rank) < len(deltas):
        rows = torch.stack([dense(delta).reshape(-1) for delta in deltas])
        return (rows @ rows.T).to(torch.float64)
    up = torch.cat([delta.up for delta in low_rank], dim=1).to(torch.float64)
    down = torch.cat([delta.down for delta in low_rank], dim=0).to(torch.float64)
    tasks = torch.repeat_interleave(torch.tensor([delta.rank for delta in low_rank]))
    member = torch.nn.functional.one_hot(tasks, len(low_rank)).to(torch.float64)
    return member.T @ ((up.T @ up) * (down @ down.T)) @ member
