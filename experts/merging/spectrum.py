"""Singular value decompositions for the merges of matrices: exact for products, through QR of the factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.solvers import DENSE_SOLVERS, SMALL_SOLVERS, solve
from experts.errors import MergeError
from experts.factors import Delta, LowRank, dense

_ZERO = 1e-6
"""Singular values below that part of the largest are rounding of the float32 entries."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A thin SVD without its numerically zero part, float64.

    Attributes:
        left: (rows, k), orthonormal columns.
        values: (k,), descending, positive.
        right: (k, columns), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def leading(self, rank: int) -> "Spectrum":
        """The part of the `rank` largest singular values."""
        return Spectrum(self.left[:, :rank], self.values[:rank], self.right[:rank])


def spectrum(delta: Delta) -> Spectrum:
    """The SVD of a matrix.

    Args:
        delta: (rows, columns), finite.

    Raises:
        MergeError: no solver converges.
    """
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        left_basis, up = torch.linalg.qr(delta.up.to(torch.float64))
        right_basis, down = torch.linalg.qr(delta.down.to(torch.float64).T)
        solution = solve(up @ down.T, SMALL_SOLVERS)
    else:
        left_basis = right_basis = None
        solution = solve(dense(delta).to(torch.float64), DENSE_SOLVERS)
    if solution is None:
        raise MergeError(f"no SVD of a {list(delta.shape)} matrix converges; its weights are likely broken")
    left, values, right = solution
    rank = int((values > _ZERO * values.max()).sum()) if len(values) else 0
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    if left_basis is not None and right_basis is not None:
        left, right = left_basis @ left, right @ right_basis.T
    return Spectrum(left, values, right)


def orthogonalised(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: P·Qᵀ of the SVD P·D·Qᵀ (orthogonal Procrustes).

    Computed by whitening, V·(VᵀV)^(−1/2). Directions in which the columns depend on each other are left
    out, so that equal columns share one direction.

    Args:
        vectors: (n, k) float64, columns of length one.

    Returns:
        (n, k).
    """
    values, basis = torch.linalg.eigh(vectors.T @ vectors)
    kept = values > _ZERO**2
    basis, values = basis[:, kept], values[kept]
    whitening: Tensor = (basis / values.sqrt()) @ basis.T
    return vectors @ whitening
