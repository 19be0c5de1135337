"""Truncated SVD of one weight difference (Twin-Merging, arXiv 2406.15479, eq. 3), exact for products."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.solvers import DENSE_SOLVERS, SMALL_SOLVERS, Solver, solve
from experts.errors import CompressionError
from experts.factors import Delta, LowRank, SvdFactors, dense

_NOISE = 1e-8
"""Singular values below that part of the largest are noise of the eigenvalue solver."""

_CANCELLED = 2.0**-30
"""The same, as part of the factors' norms, where the products of a `LowRank` cancel each other."""

_TRUSTED = 1e-4
"""How far the singular values' energy may be from the tensor's own before the solver is not believed."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """An SVD before it is truncated and rounded.

    Attributes:
        U: (rows, k) float32.
        values: (n,) float64, n >= k: all singular values above noise, descending.
        Vh: (k, columns) float32.
    """

    U: Tensor
    values: Tensor
    Vh: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole tensor."""
        return float(torch.linalg.vector_norm(self.values))

    def kept(self, rank: int) -> "Decomposition":
        """The same with the vectors of the `rank` largest values only; all values stay known."""
        return Decomposition(self.U[:, :rank].clone(), self.values, self.Vh[:rank].clone())

    def lost(self, rank: int) -> float:
        """Frobenius norm of what the best approximation of that rank leaves out."""
        return float(torch.linalg.vector_norm(self.values[rank:]))

    def at(self, rank: int) -> SvdFactors:
        """The best approximation of that rank, float32."""
        return SvdFactors(self.U[:, :rank], self.values[:rank].to(torch.float32), self.Vh[:rank])


def rounding(exact: SvdFactors, stored: SvdFactors) -> float:
    """Frobenius norm of the difference of two products, without multiplying them out."""
    ours = exact.U.double() * exact.S.double()
    theirs = stored.U.double() * stored.S.double()
    apart = LowRank(torch.cat([ours, -theirs], dim=1), torch.cat([exact.Vh.double(), stored.Vh.double()]))
    return frobenius(apart)


def frobenius(delta: Delta) -> float:
    """Frobenius norm; of a product without multiplying it out: ‖Ru·Rdᵀ‖ of the factors' QR."""
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        _, up = torch.linalg.qr(delta.up.double(), mode="r")
        _, down = torch.linalg.qr(delta.down.double().T, mode="r")
        return float(torch.linalg.vector_norm(up @ down.T))
    return float(torch.linalg.vector_norm(dense(delta), dtype=torch.float64))


def require_finite(delta: Delta, name: str) -> None:
    """Raise unless every entry is finite.

    Raises:
        CompressionError: NaN or Inf; names the tensor.
    """
    for part in (delta.up, delta.down) if isinstance(delta, LowRank) else (delta,):
        if not torch.isfinite(part).all():
            raise CompressionError(f"{name} has NaN or Inf; train the fine-tune again or leave it out")


def decompose(delta: Delta, name: str, solvers: Sequence[Solver] = DENSE_SOLVERS) -> Decomposition:
    """The SVD of a 2-D difference, without its numerically zero part.

    A low-rank product is decomposed exactly through QR of both factors and the SVD of the small core.

    Args:
        delta: (rows, columns), float32.
        name: for messages.
        solvers: tried in order on a dense difference.

    Raises:
        CompressionError: not a matrix, not finite, or no solver converges; names the tensor.
    """
    if len(delta.shape) != 2:
        raise CompressionError(f"{name} has shape {list(delta.shape)}; only matrices can be factored")
    require_finite(delta, name)
    norm = frobenius(delta)
    floor = 0.0
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        left_basis, up = torch.linalg.qr(delta.up.double())
        right_basis, down = torch.linalg.qr(delta.down.double().T)
        floor = _CANCELLED * float(torch.linalg.vector_norm(up) * torch.linalg.vector_norm(down))
        solution = solve(up @ down.T, SMALL_SOLVERS)
        if solution is not None:
            left, values, right = solution
            solution = left_basis @ left, values, right @ right_basis.T
    else:
        solution = solve(dense(delta).double(), solvers)
    if solution is None:
        raise CompressionError(f"no SVD of {name} converges; its weights are likely broken")
    left, values, right = solution
    if abs(float(torch.linalg.vector_norm(values)) - norm) > _TRUSTED * norm + floor:
        raise CompressionError(f"the SVD of {name} does not reproduce it; its weights are likely broken")
    rank = int((values > max(floor, _NOISE * float(values.max()) if len(values) else 0.0)).sum())
    signs = _signs(left[:, :rank])
    return Decomposition(
        (left[:, :rank] * signs).to(torch.float32),
        values[:rank],
        (right[:rank] * signs[:, None]).to(torch.float32),
    )


def _signs(left: Tensor) -> Tensor:
    """±1 for each column so that its largest entry becomes positive: one form, whatever the solver."""
    if not left.numel():
        return torch.ones(left.shape[1], dtype=left.dtype)
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(left.dtype)


def energy_rank(values: Tensor, energy: float) -> int:
    """Smallest rank whose squared singular values sum to at least that fraction of all."""
    if not len(values):
        return 0
    sums = values.square().cumsum(0)
    # A hair below, so that energy 1 does not ask for more than rounding lets the sum reach.
    return int(torch.searchsorted(sums, sums[-1] * energy * (1 - 1e-12))) + 1


def truncated_svd(
    delta: Delta,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "tensor",
) -> SvdFactors:
    """Best approximation of a difference by factors, in the Frobenius norm (Eckart-Young).

    Args:
        delta: (rows, columns), float32.
        rank: singular values kept at most; None for no limit.
        energy: fraction of the squared singular values kept at least, in (0, 1]; None for all.
        dtype: of U and Vh.
        name: for messages.

    Returns:
        Factors; of rank 0 where the difference is zero.

    Raises:
        CompressionError: impossible rank or energy, not a matrix, not finite; names the tensor.
    """
    if rank is not None and rank < 1:
        raise CompressionError(f"{name}: rank {rank} keeps nothing; give at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise CompressionError(f"{name}: energy {energy} is not a fraction; give a number in (0, 1]")
    whole = decompose(delta, name)
    kept = len(whole.values)
    if rank is not None:
        kept = min(kept, rank)
    if energy is not None:
        kept = min(kept, energy_rank(whole.values, energy))
    best = whole.at(kept)
    return SvdFactors(best.U.to(dtype).contiguous(), best.S, best.Vh.to(dtype).contiguous())
