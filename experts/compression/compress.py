"""A whole exclusive vector → factors, exact vectors and a report of what each tensor lost."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.budget import BudgetAllocation, Counts, Decomposed
from experts.compression.kinds import TensorKind, tensor_kind
from experts.compression.precision import widths
from experts.compression.report import CompressionReport, TensorReport
from experts.compression.spec import CompressionSpec
from experts.compression.stored import StoredFactors, encode
from experts.compression.svd import decompose, energy_rank, frobenius, require_finite, rounding
from experts.compression.weighted import decompose_weighted
from experts.errors import CompressionError
from experts.factors import Delta, SvdFactors, dense


@dataclass(frozen=True, slots=True)
class CompressedExpert:
    """What is stored of one exclusive vector, by parameter name.

    Attributes:
        stored: matrices, truncated, in the form they are stored in.
        factors: the same as they are served, decoded.
        exact: vectors kept whole, 1-D float32; empty unless the spec says extras="exact".
        report: every tensor of the exclusive vector, the folded ones too.
    """

    stored: dict[str, StoredFactors]
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
    statistics: Mapping[str, Tensor] | None = None,
) -> CompressedExpert:
    """Compress an exclusive vector that streams by once.

    Args:
        deltas: (parameter, v_t), float32; None is skipped.
        spec: how much is kept, in which form.
        model_nbytes: bytes of a full model, for the report's fraction.
        kind_of: the role of a parameter by name and shape.
        progress: called with each parameter's name once it is decomposed.
        statistics: parameter → second moments of its inputs, see `activation_statistics`; needed for, and
            only used by, allocation="activation".

    Returns:
        Factors and vectors in stream order; a parameter whose v_t is zero is only in the report.

    Raises:
        CompressionError: NaN or Inf, a name twice, a changed tensor that is neither matrix nor vector (fused
            expert weights, say), a budget too small, or no statistics where they are needed; names the tensor.
    """
    work = _Work(spec, statistics)
    for name, delta in deltas:
        if delta is None:
            continue
        work.add(name, delta, kind_of(name, tuple(delta.shape)))
        if progress is not None:
            progress(name)
    return work.finish(model_nbytes)


class _Work:
    """An expert in the making."""

    def __init__(self, spec: CompressionSpec, statistics: Mapping[str, Tensor] | None) -> None:
        self._spec = spec
        self._statistics = statistics or {}
        self._stored: dict[str, StoredFactors] = {}
        self._factors: dict[str, SvdFactors] = {}
        self._exact: dict[str, Tensor] = {}
        # A tensor's report is None until the budget is shared out; its place in the order is kept.
        self._reports: dict[str, TensorReport | None] = {}
        self._budget = (
            BudgetAllocation(spec.budget_bytes, widths(spec.dtype)) if spec.budget_bytes is not None else None
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
            whole = self._decompose(name, delta)
            if self._budget is not None:
                self._reports[name] = None
                self._budget.add(name, whole)
            else:
                self._keep_factors(name, whole, {widths(self._spec.dtype)[0]: self._rank(whole)})

    def finish(self, model_nbytes: int | None) -> CompressedExpert:
        """Share out the budget, if there is one, and report."""
        if self._budget is not None:
            reserved = sum(vector.nbytes for vector in self._exact.values())
            for name, (whole, counts) in self._budget.counts(reserved).items():
                self._keep_factors(name, whole, counts)
        tensors = tuple(report for report in self._reports.values() if report is not None)
        return CompressedExpert(
            self._stored,
            self._factors,
            self._exact,
            CompressionReport(tensors=tensors, model_nbytes=model_nbytes),
        )

    def _decompose(self, name: str, delta: Delta) -> Decomposed:
        if self._spec.allocation == "energy":
            return decompose(delta, name)
        moments = self._statistics.get(name)
        if moments is None:
            raise CompressionError(
                f"there are no activation statistics of {name}; allocation=activation needs prompts, and linear "
                "layers only: give prompts and fold the extras, or use allocation=energy"
            )
        return decompose_weighted(delta, moments, name)

    def _rank(self, whole: Decomposed) -> int:
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

    def _keep_factors(self, name: str, whole: Decomposed, counts: Counts) -> None:
        rank = sum(counts.values())
        shape = (whole.U.shape[0], whole.Vh.shape[1])
        lost, nbytes = whole.lost(rank), 0
        if rank:
            best = whole.at(rank)
            stored = encode(best, counts, self._spec.torch_dtype)
            self._stored[name], self._factors[name] = stored, stored.decoded()
            # Truncation and rounding are orthogonal to first order.
            lost, nbytes = (lost**2 + rounding(best, self._factors[name]) ** 2) ** 0.5, stored.nbytes
        self._reports[name] = TensorReport(
            name=name, shape=shape, handling="factored", rank=rank, nbytes=nbytes, norm=whole.norm, error=lost
        )
