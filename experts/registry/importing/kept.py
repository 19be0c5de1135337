"""An exported adapter → the very factors that were exported, bit by bit, if nobody has changed it since."""

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint, FineTune
from experts.checkpoint.mark import Exactly
from experts.compression import CompressedExpert, CompressionReport, TensorReport
from experts.compression.stored import PlainRun, StoredFactors
from experts.compression.svd import frobenius, require_finite
from experts.factors import LowRank, SvdFactors

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)
}


def kept_adapter(adapter: FineTune, exactly: Exactly, shared: Checkpoint) -> CompressedExpert | None:
    """The expert that an adapter over the shared expert was exported from; None if it does not give it exactly.

    Trusts nothing: the singular values that the file tells count only where they reproduce its factors.

    Args:
        adapter: opened against the shared expert.
        exactly: what its file tells beside the factors.
        shared: the shared expert.

    Raises:
        CompressionError: NaN or Inf; names the tensor.
    """
    dtype = _DTYPES.get(exactly.dtype)
    if dtype is None:
        return None
    factors: dict[str, SvdFactors] = {}
    exact: dict[str, Tensor] = {}
    reports = []
    for name in shared.names:
        delta = adapter.delta(name)
        if delta is None:
            continue
        require_finite(delta, name)
        if isinstance(delta, LowRank):
            found = split(delta, exactly.values.get(name, ()), dtype)
            if found is None:
                return None
            factors[name] = found
            reports.append(_report(name, found, found.low_rank()))
        elif delta.dim() == 1:
            exact[name] = delta.to(torch.float32, copy=True)
            norm = frobenius(delta)
            reports.append(
                TensorReport(
                    name=name,
                    shape=tuple(delta.shape),
                    handling="exact",
                    rank=0,
                    nbytes=exact[name].nbytes,
                    norm=norm,
                    error=0.0,
                )
            )
        else:
            return None
    stored = {
        name: StoredFactors(found.shape, found.S, PlainRun(found.U, found.Vh), ())
        for name, found in factors.items()
    }
    report = CompressionReport(tensors=tuple(reports), model_nbytes=shared.nbytes)
    return CompressedExpert(stored, factors, exact, report)


def split(product: LowRank, values: tuple[float, ...], dtype: torch.dtype) -> SvdFactors | None:
    """U·S and Vh back into U, S and Vh of a dtype; None unless they multiply to exactly the same B and A.

    Args:
        product: up = fl(U·S) (rows, k or more) and down = Vh, float32; columns beyond the values are padding.
        values: S.
        dtype: of U and Vh.
    """
    rank = len(values)
    S = torch.tensor(values, dtype=torch.float32)
    if not 0 < rank <= min(*product.shape, product.rank) or not torch.isfinite(S).all() or not (S > 0).all():
        return None
    if (S.diff() > 0).any() or product.up[:, rank:].any():
        return None
    up, down = product.up[:, :rank], product.down[:rank]
    U, Vh = _divided(up, S).to(dtype).contiguous(), down.to(dtype).contiguous()
    if not torch.equal(U.to(torch.float32) * S, up) or not torch.equal(Vh.to(torch.float32), down):
        return None
    return SvdFactors(U, S, Vh)


def _divided(up: Tensor, S: Tensor) -> Tensor:
    """A U whose float32 product with S is `up`, where there is one: the quotient or a neighbour of it."""
    U = up / S
    for direction in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(U, torch.full_like(U, direction))
        U = torch.where((up != U * S) & (up == neighbour * S), neighbour, U)
    return U


def _report(name: str, factors: SvdFactors, product: LowRank) -> TensorReport:
    return TensorReport(
        name=name,
        shape=factors.shape,
        handling="factored",
        rank=factors.rank,
        nbytes=factors.nbytes,
        norm=frobenius(product),
        error=0.0,
    )
