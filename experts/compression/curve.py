"""One exclusive vector at many sizes and in many forms: the points of a quality-per-byte curve."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from experts.compression.baselines import dare, dare_nbytes, one_bit, sparse, sparse_count
from experts.compression.compress import compress
from experts.compression.kinds import tensor_kind
from experts.compression.precision import ladder, widths
from experts.compression.spec import Allocation, Codec, CompressionSpec
from experts.compression.svd import frobenius
from experts.factors import Delta, dense

FRACTIONS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Bytes of an expert over those of a full model."""

Form = Literal["bfloat16", "int8", "int4", "mixed", "sparse", "ternary", "one-bit", "dare"]
FORMS: tuple[Form, ...] = ("bfloat16", "int8", "int4", "mixed", "sparse", "ternary", "one-bit", "dare")
_CODECS: dict[str, Codec] = {"bfloat16": "bfloat16", "int8": "int8", "int4": "int4", "mixed": "mixed"}


@dataclass(frozen=True, slots=True)
class CodecPoint:
    """One approximation of an exclusive vector.

    Attributes:
        form: how it is stored.
        fraction: the budget asked for, over a full model's bytes; None where the form has only one size.
        changes: parameter → approximation, for `PatchedModel.apply` on the shared expert.
        nbytes: bytes that it takes, at most the budget.
        relative_error: Frobenius error over norm of the whole vector.
    """

    form: Form
    fraction: float | None
    changes: Mapping[str, Delta]
    nbytes: int
    relative_error: float


def codec_points(
    deltas: Callable[[], Iterable[tuple[str, Delta | None]]],
    model_nbytes: int,
    forms: Sequence[Form] = FORMS,
    fractions: Sequence[float] = FRACTIONS,
    allocation: Allocation = "energy",
    statistics: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Iterator[CodecPoint]:
    """Approximations of one exclusive vector from small to large, form by form, made as they are asked for.

    A fraction that is too small for a form has no point; those beyond its whole vector have none either.
    Biases, norms, embeddings and heads are left to the shared expert.

    Args:
        deltas: gives the exclusive vector's stream anew at every call.
        model_nbytes: bytes of a full model.
        forms, fractions: what is wanted.
        allocation, statistics: as in `CompressionSpec` and `compress`; for the factored forms.
        seed: of DARE.
    """
    linear = _LinearOnly(deltas)
    for form in forms:
        before = -1
        for fraction in fractions if form != "one-bit" else (None,):
            # No form fits into a single byte, so that one stands for none.
            budget = None if fraction is None else max(int(fraction * model_nbytes), 1)
            if form in _CODECS and budget is not None:
                spec = CompressionSpec(budget_bytes=budget, dtype=_CODECS[form], allocation=allocation)
                point = _factored(form, fraction, linear, spec, statistics)
            else:
                point = _baseline(form, fraction, linear, budget, seed)
            if point is None:
                continue
            if point.nbytes == before:
                break
            before = point.nbytes
            yield point


class _LinearOnly:
    """The stream of changed matrices without what shared weights alone carry, and facts of the whole."""

    def __init__(self, deltas: Callable[[], Iterable[tuple[str, Delta | None]]]) -> None:
        self._deltas = deltas
        self._shapes = tuple((delta.shape[0], delta.shape[1]) for _, delta in self)
        self.entries = sum(rows * columns for rows, columns in self._shapes)

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        for name, delta in self._deltas():
            if delta is not None and tensor_kind(name, tuple(delta.shape)) == "linear" and frobenius(delta):
                yield name, delta

    def least(self, codec: Codec) -> int:
        """Bytes of the cheapest singular value."""
        return min((ladder(shape, widths(codec))[0].nbytes for shape in self._shapes), default=0)


def _factored(
    form: Form,
    fraction: float | None,
    linear: _LinearOnly,
    spec: CompressionSpec,
    statistics: Mapping[str, Tensor] | None,
) -> CodecPoint | None:
    if spec.budget_bytes is not None and spec.budget_bytes < linear.least(spec.dtype):
        return None
    kept = compress(linear, spec, statistics=statistics)
    changes = {name: factors.low_rank() for name, factors in kept.factors.items()}
    return CodecPoint(form, fraction, changes, kept.nbytes, kept.report.relative_error)


def _baseline(
    form: Form, fraction: float | None, linear: _LinearOnly, budget: int | None, seed: int
) -> CodecPoint | None:
    """Every matrix gets of the budget what it has of the entries."""
    changes: dict[str, Delta] = {}
    nbytes, lost, norm = 0, 0.0, 0.0
    for place, (name, delta) in enumerate(linear):
        size = delta.shape[0] * delta.shape[1]
        share = None if budget is None else budget * size // linear.entries
        made = _approximation(form, delta, size, share, seed + place)
        if made is None:
            return None
        changes[name] = made[0]
        nbytes += made[1]
        whole = dense(delta)
        norm += float(whole.square().sum())
        lost += float((whole - made[0]).square().sum())
    return CodecPoint(form, fraction, changes, nbytes, (lost / norm) ** 0.5 if norm else 0.0)


def _approximation(
    form: Form, delta: Delta, size: int, share: int | None, seed: int
) -> tuple[Tensor, int] | None:
    if share is None:
        return one_bit(delta)
    if form == "dare":
        count = min(size, (share - dare_nbytes(0)) // 2)
        return dare(delta, count / size, seed) if count > 0 else None
    bits = 1 if form == "ternary" else 16
    count = sparse_count(size, share, bits)
    return sparse(delta, count / size, bits) if count else None
