"""The packed factors of the experts that are active in a step.

Experts stand in the buffers as segments, one after the other, each with its own rank (no padding).
A newly active expert is appended; one that falls idle keeps its segment, gated by zero. When idle rows
outweigh the active ones, everything is packed anew: at once if something must be copied anyway, else
after they did so for some steps. So a batch whose experts come and go copies a few rows per change, not
the whole set, and a batch that settles does not go on multiplying by zeros.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core import ExpertKey
from service.gating.resident import MatrixFactors, ResidentExpert

_PATIENCE = 8
"""Steps in which idle rows may outweigh the active ones before a settled set is packed anew."""


class PackedFactors:
    """Rows of factors in one dtype, growing at the end: a is (rows, in), b is (rows, out)."""

    __slots__ = ("_a", "_b", "a", "b")

    def __init__(self) -> None:
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    def append(self, used: int, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        """Put (k, in) and (k, out) behind the first `used` rows."""
        needed = used + a.shape[0]
        self._a = _grown(self._a, used, needed, a, dtype)
        self._b = _grown(self._b, used, needed, b, dtype)
        self._a[used:needed].copy_(a)
        self._b[used:needed].copy_(b)
        self.a, self.b = self._a[:needed], self._b[:needed]

    def clear(self, *, release: bool) -> None:
        """Forget the rows; the memory stays for the next ones unless it is released."""
        self.a = self.b = None
        if release:
            self._a = self._b = None

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(tensor.nbytes for tensor in (self._a, self._b) if tensor is not None)


def _grown(held: Tensor | None, used: int, needed: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    if held is not None and held.shape[0] >= needed:
        return held
    larger = like.new_empty(max(needed, 2 * used), like.shape[1], dtype=dtype)
    if held is not None:
        larger[:used].copy_(held[:used])
    return larger


class MatrixBuffer:
    """Packed factors of one matrix parameter.

    Attributes:
        native: in the model's dtype, for steps of many tokens.
        fine: in float32, for steps of few tokens where the processor multiplies small float32 matrices
            faster than small bfloat16 ones; None where it never does.
        rows: factor rows in use; 0 while no active expert touches the parameter.
        layout: index of the segment-rank layout that it shares with other parameters.
    """

    __slots__ = ("fine", "layout", "native", "ranks", "rows")

    def __init__(self, *, fine: bool) -> None:
        self.native = PackedFactors()
        self.fine = PackedFactors() if fine else None
        self.ranks: list[int] = []
        self.rows = 0
        self.layout = 0

    def append(self, factors: MatrixFactors | None) -> None:
        """Add one segment; None for an expert that leaves the parameter alone."""
        if factors is None:
            self.ranks.append(0)
            return
        self.native.append(self.rows, factors.a, factors.b, factors.a.dtype)
        if self.fine is not None:
            self.fine.append(self.rows, factors.a, factors.b, torch.float32)
        self.ranks.append(factors.a.shape[0])
        self.rows += factors.a.shape[0]

    def clear(self, *, release: bool) -> None:
        """Forget all segments."""
        self.ranks = []
        self.rows = 0
        self.native.clear(release=release)
        if self.fine is not None:
            self.fine.clear(release=release)

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return self.native.nbytes + (self.fine.nbytes if self.fine is not None else 0)


class VectorBuffer:
    """Packed differences of one bias or norm weight, (segments, dim), or None while nobody has one."""

    __slots__ = ("rows", "stacked")

    def __init__(self) -> None:
        self.rows: list[Tensor | None] = []
        self.stacked: Tensor | None = None

    def restack(self) -> None:
        """Rebuild `stacked` from the segments' rows."""
        present = next((row for row in self.rows if row is not None), None)
        if present is None:
            self.stacked = None
            return
        zero = torch.zeros_like(present)
        self.stacked = torch.stack([zero if row is None else row for row in self.rows])


@dataclass(frozen=True, slots=True)
class Change:
    """What `WorkingSet.ensure` did."""

    appended: int
    repacked: bool

    @property
    def any(self) -> bool:
        """Something was copied."""
        return self.repacked or self.appended > 0


class WorkingSet:
    """Segments of the active experts over all parameters.

    Args:
        matrices: names of the matrix parameters.
        vectors: names of the biases and norm weights.
        fine: keep float32 copies of the factors too.
    """

    def __init__(self, matrices: Iterable[str], vectors: Iterable[str], *, fine: bool) -> None:
        self.matrices = {name: MatrixBuffer(fine=fine) for name in matrices}
        self.vectors = {name: VectorBuffer() for name in vectors}
        self.segments: list[ExpertKey] = []
        self.layouts: list[tuple[int, ...]] = []
        self._mostly_idle = 0

    def ensure(self, active: Iterable[ExpertKey], resident: Mapping[ExpertKey, ResidentExpert]) -> Change:
        """Make every active expert a segment. KeyError if one is not resident: a lease was broken."""
        wanted = set(active)
        missing = sorted(wanted.difference(self.segments))
        idle = [key for key in self.segments if key not in wanted]
        outweighed = bool(idle) and self._rows(idle, resident) > self._rows(wanted, resident)
        self._mostly_idle = self._mostly_idle + 1 if outweighed else 0
        if not missing and self._mostly_idle < _PATIENCE:
            return Change(0, repacked=False)
        if outweighed:
            self.clear()
            missing = sorted(wanted)
        repacked = not self.segments
        try:
            for key in missing:
                self._append(resident[key])
        except BaseException:
            self.clear()
            raise
        self._refresh()
        return Change(len(missing), repacked)

    def touches(self, expert: ResidentExpert) -> bool:
        """The expert changes a parameter that is packed here."""
        return not (
            self.matrices.keys().isdisjoint(expert.matrices)
            and self.vectors.keys().isdisjoint(expert.vectors)
        )

    def clear(self, *, release: bool = False) -> None:
        """Drop every segment, and its memory too if it is released; the next `ensure` packs anew."""
        self.segments = []
        self._mostly_idle = 0
        for matrix in self.matrices.values():
            matrix.clear(release=release)
        for vector in self.vectors.values():
            vector.rows = []
        self._refresh()

    @property
    def most_rows(self) -> int:
        """Factor rows of the parameter that has most."""
        return max((matrix.rows for matrix in self.matrices.values()), default=0)

    def spread(self, gates: Tensor, layout: Sequence[int]) -> Tensor:
        """Segment gates (sequences, segments) → one per factor row (sequences, rows)."""
        repeats = torch.tensor(layout, device=gates.device)
        return gates.repeat_interleave(repeats, dim=1, output_size=sum(layout))

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def _append(self, expert: ResidentExpert) -> None:
        for name, buffer in self.matrices.items():
            buffer.append(expert.matrices.get(name))
        for name, vector in self.vectors.items():
            vector.rows.append(expert.vectors.get(name))
        self.segments.append(expert.key)

    def _refresh(self) -> None:
        layouts: dict[tuple[int, ...], int] = {}
        for buffer in self.matrices.values():
            buffer.layout = layouts.setdefault(tuple(buffer.ranks), len(layouts))
        self.layouts = list(layouts)
        for vector in self.vectors.values():
            vector.restack()

    @staticmethod
    def _rows(keys: Iterable[ExpertKey], resident: Mapping[ExpertKey, ResidentExpert]) -> int:
        return sum(resident[key].max_rank for key in keys if key in resident)
