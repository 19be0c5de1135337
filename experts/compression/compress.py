"""A whole exclusive vector → factors, exact vectors and a report of what each tensor lost."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.budget import BudgetAllocation
from experts.compression.kinds import TensorKind, tensor_kind
from experts.compression.report import CompressionReport, TensorReport
from experts.compression.spec import CompressionSpec
from experts.compression.svd import Decomposition, decompose, energy_rank, frobenius, require_finite
from experts.errors import CompressionError
from experts.factors import Delta, SvdFactors, dense


@dataclass(frozen=True, slots=True)
class CompressedExpert:
    """What is stored of one exclusive vector, by parameter name.

    Attributes:
        factors: matrices, truncated.
        exact: vectors kept whole, 1-D float32; empty unless the spec says extras="exact".
        report: every tensor of the exclusive vector, the folded ones too.
    """

    factors: dict[str, SvdFactors]
    exact: dict[str, Tensor]
    report: CompressionReport

    @property
    def nbytes(self) -> int:
        """True bytes of all stored tensors."""
        return self.report.nbytes


def compress(
    deltas: Iterable[tuple[str, Delta | None]],
    spec: CompressionSpec,
    model_nbytes: int | None = None,
    kind_of: Callable[[str, tuple[int, ...]], TensorKind] = tensor_kind,
    progress: Callable[[str], None] | None = None,
) -> CompressedExpert:
    """Compress an exclusive vector that streams by once.

    Args:
        deltas: (parameter, v_t), float32; None is skipped.
        spec: how much is kept, in which form.
        model_nbytes: bytes of a full model, for the report's fraction.
        kind_of: the role of a parameter by name and shape.
        progress: called with each parameter's name once it is decomposed.

    Returns:
        Factors and vectors in stream order; a parameter whose v_t is zero is only in the report.

    Raises:
        CompressionError: NaN or Inf, a name twice, a changed tensor that is neither matrix nor vector (fused
            expert weights, say), or a budget too small; names the tensor.
    """
    work = _Work(spec)
    for name, delta in deltas:
        if delta is None:
            continue
        work.add(name, delta, kind_of(name, tuple(delta.shape)))
        if progress is not None:
            progress(name)
    return work.finish(model_nbytes)


class _Work:
    """An expert in the making."""

    def __init__(self, spec: CompressionSpec) -> None:
        self._spec = spec
        self._dtype = spec.torch_dtype
        self._factors: dict[str, SvdFactors] = {}
        self._exact: dict[str, Tensor] = {}
        # A tensor's report is None until the budget is shared out; its place in the order is kept.
        self._reports: dict[str, TensorReport | None] = {}
        self._budget = (
            BudgetAllocation(spec.budget_bytes, self._dtype) if spec.budget_bytes is not None else None
        )

    def add(self, name: str, delta: Delta, kind: TensorKind) -> None:
        """Fold, keep or decompose one tensor."""
        if name in self._reports:
            raise CompressionError(f"{name} comes twice in one exclusive vector")
        require_finite(delta, name)
        if kind == "other" and frobenius(delta):
            raise CompressionError(
                f"{name} was changed and has shape {list(delta.shape)}: only matrices, vectors, embeddings and "
                "heads can differ between experts; fine-tune without it (freeze it, or leave it out of a "
                "LoRA's targets)"
            )
        if kind == "other" or (kind != "linear" and self._spec.extras == "fold"):
            norm = frobenius(delta)
            self._reports[name] = TensorReport(
                name=name,
                shape=tuple(delta.shape),
                handling="folded",
                rank=0,
                nbytes=0,
                norm=norm,
                error=norm,
            )
        elif kind == "vector":
            self._keep_vector(name, dense(delta))
        else:
            whole = decompose(delta, name)
            if self._budget is not None:
                self._reports[name] = None
                self._budget.add(name, whole)
            else:
                self._keep_factors(name, whole, self._rank(whole))

    def finish(self, model_nbytes: int | None) -> CompressedExpert:
        """Share out the budget, if there is one, and report."""
        if self._budget is not None:
            reserved = sum(vector.nbytes for vector in self._exact.values())
            for name, (whole, rank) in self._budget.ranks(reserved).items():
                self._keep_factors(name, whole, rank)
        tensors = tuple(report for report in self._reports.values() if report is not None)
        return CompressedExpert(
            self._factors, self._exact, CompressionReport(tensors=tensors, model_nbytes=model_nbytes)
        )

    def _rank(self, whole: Decomposition) -> int:
        if self._spec.rank is not None:
            return min(self._spec.rank, len(whole.values))
        return energy_rank(whole.values, self._spec.energy if self._spec.energy is not None else 1.0)

    def _keep_vector(self, name: str, vector: Tensor) -> None:
        kept = vector.to(torch.float32, copy=True)
        norm = frobenius(kept)
        if norm:
            self._exact[name] = kept
        self._reports[name] = TensorReport(
            name=name,
            shape=tuple(kept.shape),
            handling="exact",
            rank=0,
            nbytes=kept.nbytes if norm else 0,
            norm=norm,
            error=0.0,
        )

    def _keep_factors(self, name: str, whole: Decomposition, rank: int) -> None:
        factors = whole.truncated(rank, self._dtype)
        if rank:
            self._factors[name] = factors
        self._reports[name] = TensorReport(
            name=name,
            shape=factors.shape,
            handling="factored",
            rank=rank,
            nbytes=factors.nbytes if rank else 0,
            norm=whole.norm,
            error=whole.error(factors),
        )
