"""Truncation that loses least of a layer's *outputs*: the best rank-k V̂ in ‖(V − V̂)·C^½‖.

C holds the second moments E[x xᵀ] of the inputs (ASVD, arXiv 2312.05821, takes its diagonal; SVD-LLM, arXiv
2403.07378, whitens by all of it). With Q the left singular vectors of V·C^½ the optimum is V̂ = Q·Qᵀ·V, so C
never has to be inverted, and of a low-rank V = up·down only the small matrix down·C·downᵀ is needed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.solvers import DENSE_SOLVERS, SMALL_SOLVERS, solve
from experts.compression.svd import frobenius, require_finite
from experts.errors import CompressionError
from experts.factors import Delta, LowRank, SvdFactors, dense

DAMPING = 0.01
"""Part of the mean second moment that is added to each, so that inputs the calibration lacks keep some worth."""

_NOISE = 1e-7


@dataclass(frozen=True, slots=True)
class WeightedDecomposition:
    """A matrix seen through its inputs.

    Attributes:
        U: (rows, k) float32, orthonormal, ordered by what they carry of the output.
        values: (n,) float64, n >= k, descending: singular values of V·C^½.
        Vh: (k, columns) float32: Uᵀ·V, rows neither of unit length nor orthogonal.
        norm: Frobenius norm of V itself.
    """

    U: Tensor
    values: Tensor
    Vh: Tensor
    norm: float

    def kept(self, rank: int) -> "WeightedDecomposition":
        """The same with the `rank` foremost vectors only; all values stay known."""
        return WeightedDecomposition(self.U[:, :rank].clone(), self.values, self.Vh[:rank].clone(), self.norm)

    def lost(self, rank: int) -> float:
        """Frobenius norm of V − Q·Qᵀ·V."""
        held = float(torch.linalg.vector_norm(self.Vh[:rank], dtype=torch.float64))
        return math.sqrt(max(self.norm**2 - held**2, 0.0))

    def at(self, rank: int) -> SvdFactors:
        """Q·Qᵀ·V of that rank as an ordinary SVD, float32."""
        solution = solve(self.Vh[:rank].double(), SMALL_SOLVERS)
        if solution is None:
            raise CompressionError(
                "no SVD of a weighted approximation converges; the weights are likely broken"
            )
        left, values, right = solution
        return SvdFactors(
            (self.U[:, :rank].double() @ left).to(torch.float32),
            values.to(torch.float32),
            right.to(torch.float32),
        )


def decompose_weighted(delta: Delta, moments: Tensor, name: str) -> WeightedDecomposition:
    """The weighted SVD of a linear layer's difference.

    Args:
        delta: (out, in) float32.
        moments: second moments of the inputs, (in,) or (in, in).
        name: for messages.

    Raises:
        CompressionError: not a matrix, not finite, moments of another size, or no solver converges.
    """
    if len(delta.shape) != 2:
        raise CompressionError(f"{name} has shape {list(delta.shape)}; only matrices can be factored")
    require_finite(delta, name)
    size = delta.shape[1]
    if tuple(moments.shape) not in {(size,), (size, size)}:
        raise CompressionError(
            f"{name} takes {size} inputs and its activation statistics have shape {list(moments.shape)}; "
            "take them on the same model"
        )
    if not torch.isfinite(moments).all():
        raise CompressionError(f"the activation statistics of {name} have NaN or Inf; take them in float32")
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        basis, upper = torch.linalg.qr(delta.up.double())
        down = delta.down.double()
        solution = solve(upper @ _root(_through(down, moments) @ down.T), SMALL_SOLVERS)
        left = basis @ solution[0] if solution is not None else basis
        projected = (left.T @ delta.up.double()) @ down
    else:
        whole = dense(delta).double()
        # Any root of C will do: V·F and V·C^½ have the same left singular vectors where F·Fᵀ = C.
        solution = solve(_through_root(whole, moments), DENSE_SOLVERS)
        left = solution[0] if solution is not None else whole
        projected = left.T @ whole
    if solution is None:
        raise CompressionError(f"no weighted SVD of {name} converges; its weights are likely broken")
    values = solution[1]
    rank = int((values > _NOISE * float(values.max() if len(values) else 0.0)).sum())
    return WeightedDecomposition(
        left[:, :rank].to(torch.float32), values[:rank], projected[:rank].to(torch.float32), frobenius(delta)
    )


def _damped(moments: Tensor) -> Tensor:
    diagonal = (moments if moments.ndim == 1 else moments.diagonal()).double()
    extra = DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    if moments.ndim == 1:
        return diagonal + extra
    return moments.double() + extra * torch.eye(len(diagonal), dtype=torch.float64)


def _through(rows: Tensor, moments: Tensor) -> Tensor:
    """rows · C."""
    damped = _damped(moments)
    return rows * damped if damped.ndim == 1 else rows @ damped


def _through_root(rows: Tensor, moments: Tensor) -> Tensor:
    """rows · F with F·Fᵀ = C."""
    damped = _damped(moments)
    return rows * damped.sqrt() if damped.ndim == 1 else rows @ _root(damped)


def _root(matrix: Tensor) -> Tensor:
    """F with F·Fᵀ equal to a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
