"""Dense SVD solvers, fastest first; a later one is asked where an earlier one does not converge.

Each takes a finite float64 matrix (m, n) with m <= n and returns the thin SVD: U (m, m), S (m,)
descending, Vh (m, n).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
Solver = Callable[[Tensor], Svd]

_SWEEPS = 60
_ORTHOGONAL = 1e-14
"""Cosine below which two rows count as orthogonal in float64."""


def gram_eigh(matrix: Tensor) -> Svd:
    """Eigendecomposition of the smaller Gram matrix A·Aᵀ.

    Singular values below about 1e-8 of the largest are noise, in float64; U is orthogonal always, and so
    U·diag(S)·Vh = U·Uᵀ·A reproduces A whatever their accuracy.
    """
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return _from_left_vectors(matrix, vectors)


def lapack_svd(matrix: Tensor) -> Svd:
    """LAPACK's divide and conquer; accurate for small singular values too, several times slower."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def jacobi_svd(matrix: Tensor) -> Svd:
    """One-sided Jacobi rotations (Hestenes 1958), in round-robin order so that each round is one batch.

    Slow, but it needs nothing of LAPACK's iterations: each sweep makes the rows more nearly orthogonal.
    """
    rows = matrix.shape[0]
    even = rows + rows % 2
    # Rows of `work` are rotated until they are orthogonal: rotation · A = S · Vh, so U = rotationᵀ.
    work = torch.zeros(even, matrix.shape[1], dtype=matrix.dtype)
    work[:rows] = matrix
    rotation = torch.eye(even, dtype=matrix.dtype)
    order = torch.arange(even)
    for _ in range(_SWEEPS):
        largest = 0.0
        for _ in range(max(even - 1, 0)):
            largest = max(largest, _rotate(work, rotation, order[: even // 2], order[even // 2 :].flip(0)))
            order = torch.cat([order[:1], order[-1:], order[1:-1]])
        if largest <= _ORTHOGONAL:
            break
    return _from_left_vectors(matrix, rotation[:, :rows].T)


def _rotate(work: Tensor, rotation: Tensor, first: Tensor, second: Tensor) -> float:
    """Make the row pairs (first[i], second[i]) orthogonal in place; the largest cosine met."""
    left, right = work[first], work[second]
    alpha, beta, gamma = left.square().sum(1), right.square().sum(1), (left * right).sum(1)
    scale = (alpha * beta).sqrt()
    cosine = torch.where(scale > 0, gamma.abs() / scale.clamp(min=torch.finfo(work.dtype).tiny), 0.0)
    apart = cosine > _ORTHOGONAL
    zeta = torch.where(apart, (beta - alpha) / torch.where(apart, 2 * gamma, 1.0), 0.0)
    sign = torch.where(zeta >= 0, 1.0, -1.0).to(work.dtype)
    tangent = torch.where(apart, sign / (zeta.abs() + (1 + zeta.square()).sqrt()), 0.0)
    cos = (1 / (1 + tangent.square()).sqrt())[:, None]
    sin = cos * tangent[:, None]
    for rows in (work, rotation):
        left, right = rows[first], rows[second]
        rows[first], rows[second] = cos * left - sin * right, sin * left + cos * right
    return float(cosine.max())


def _from_left_vectors(matrix: Tensor, vectors: Tensor) -> Svd:
    """Complete an SVD from its left singular vectors, (m, m or more) in any order."""
    scaled = vectors.T @ matrix
    values, order = torch.linalg.vector_norm(scaled, dim=1).sort(descending=True, stable=True)
    rows = matrix.shape[0]
    values, order = values[:rows], order[:rows]
    right = scaled[order] / torch.where(values > 0, values, 1.0)[:, None]
    return vectors[:, order], values, right


DENSE_SOLVERS: tuple[Solver, ...] = (gram_eigh, lapack_svd, jacobi_svd)
"""For large matrices: the Gram matrix is smaller."""

SMALL_SOLVERS: tuple[Solver, ...] = (lapack_svd, jacobi_svd)
"""For the cores of low-rank products: small already, so accuracy is free."""


def solve(matrix: Tensor, solvers: Sequence[Solver]) -> Svd | None:
    """SVD of any finite float64 matrix by the first solver that converges; None if none does."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    for solver in solvers:
        try:
            left, values, right = solver(wide)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the stub leaves it out
            continue
        if all(bool(torch.isfinite(part).all()) for part in (left, values, right)):
            return (left, values, right) if wide is matrix else (right.T, values, left.T)
    return None
