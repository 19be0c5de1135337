"""Low-rank forms of a weight difference: an exact product, or truncated SVD factors.

Factors always decompose the tensor *as the checkpoint stores it* (rows, columns), whatever the module
that uses it: (out, in) for a linear layer, (in, out) for GPT-2's Conv1D, (vocabulary, hidden) for an
embedding. The gating layers know the orientation; nobody else has to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """The exact matrix ``up @ down``, never multiplied out unless asked.

    Attributes:
        up: (rows, k) floating point.
        down: (k, columns), the same dtype.
    """

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension k; an upper bound of the true rank."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The product, (rows, columns)."""
        return self.up @ self.down

    def scaled(self, weight: float) -> "LowRank":
        """``weight * up @ down``."""
        return LowRank(self.up * weight, self.down)


@dataclass(frozen=True, slots=True)
class SvdFactors:
    """Truncated SVD ``U @ diag(S) @ Vh`` of one weight difference (Twin-Merging, eq. 3).

    Attributes:
        U: (rows, k), 16- or 32-bit.
        S: (k,) float32, descending, non-negative.
        Vh: (k, columns), the dtype of U.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        return self.U.shape[0], self.Vh.shape[1]

    @property
    def rank(self) -> int:
        """Number of kept singular values."""
        return self.S.shape[0]

    @property
    def nbytes(self) -> int:
        """True stored bytes of the three tensors."""
        return self.U.nbytes + self.S.nbytes + self.Vh.nbytes

    def low_rank(self) -> LowRank:
        """The same product in two factors, float32."""
        return LowRank(self.U.to(torch.float32) * self.S, self.Vh.to(torch.float32))

    def dense(self) -> Tensor:
        """(rows, columns) in float32."""
        return self.low_rank().dense()


Delta = LowRank | Tensor
"""A difference of one tensor: an exact low-rank product, or dense."""


def dense(delta: Delta) -> Tensor:
    """The difference as a dense tensor."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def negative(delta: Delta) -> Delta:
    """The difference the other way round."""
    return delta.scaled(-1.0) if isinstance(delta, LowRank) else -delta


def summed(deltas: Sequence[Delta]) -> Delta:
    """The sum of at least one difference of one tensor.

    A product where all are products, and while its rank is below the matrix' own: a wider one says no more than the
    matrix does and takes more room, which sums of sums would multiply.
    """
    products = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(products) == len(deltas) and sum(it.rank for it in products) < min(products[0].shape):
        up = torch.cat([it.up for it in products], dim=1)
        return LowRank(up, torch.cat([it.down for it in products], dim=0))
    total = dense(deltas[0]).clone()
    for delta in deltas[1:]:
        total += dense(delta)
    return total


def added(one: Delta | None, other: Delta | None) -> Delta | None:
    """The sum of two differences of one tensor, None being none."""
    if one is None or other is None:
        return other if one is None else one
    return summed((one, other))
