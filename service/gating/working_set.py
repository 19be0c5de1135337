"""The packed factors of the experts that are active in a step.

Experts stand in the buffers as segments, one after the other, each with its own rank (no padding).
A newly active expert is appended; one that falls idle keeps its segment, gated by zero, until idle rows
outweigh the active ones, and then everything is packed anew. So a batch whose experts come and go
copies a few rows per change, not the whole set.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core import ExpertKey
from service.gating.resident import ResidentExpert


class MatrixBuffer:
    """Packed factors of one matrix parameter.

    Attributes:
        a: (rows, in) view of the rows in use, or None while no active expert touches the parameter.
        b: (rows, out) likewise.
        layout: index of the segment-rank layout that it shares with other parameters.
    """

    __slots__ = ("_a", "_b", "_inputs", "_outputs", "a", "b", "layout", "ranks")

    def __init__(self, inputs: int, outputs: int) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.ranks: list[int] = []
        self.layout = 0

    def append(self, a: Tensor | None, b: Tensor | None) -> None:
        """Add one segment; (k, in) and (k, out), or None for an expert that leaves the parameter alone."""
        used = sum(self.ranks)
        if a is None or b is None:
            self.ranks.append(0)
            return
        needed = used + a.shape[0]
        if self._a is None or self._b is None or self._a.shape[0] < needed:
            self._grow(max(needed, 2 * used), used, a)
        assert self._a is not None
        assert self._b is not None
        self._a[used:needed].copy_(a)
        self._b[used:needed].copy_(b)
        self.ranks.append(a.shape[0])
        self.a, self.b = self._a[:needed], self._b[:needed]

    def clear(self) -> None:
        """Forget all segments; the memory stays for the next ones."""
        self.ranks = []
        self.a = self.b = None

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return (self._a.nbytes if self._a is not None else 0) + (self._b.nbytes if self._b is not None else 0)

    def _grow(self, rows: int, used: int, like: Tensor) -> None:
        a = like.new_empty(rows, self._inputs)
        b = like.new_empty(rows, self._outputs)
        if used and self._a is not None and self._b is not None:
            a[:used].copy_(self._a[:used])
            b[:used].copy_(self._b[:used])
        self._a, self._b = a, b


class VectorBuffer:
    """Packed differences of one bias or norm weight: (segments, dim), or None while nobody has one."""

    __slots__ = ("_dim", "rows", "stacked")

    def __init__(self, dim: int) -> None:
        self._dim = dim
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
        matrices: parameter name → (in, out).
        vectors: parameter name → dim.
    """

    def __init__(self, matrices: Mapping[str, tuple[int, int]], vectors: Mapping[str, int]) -> None:
        self.matrices = {name: MatrixBuffer(*shape) for name, shape in matrices.items()}
        self.vectors = {name: VectorBuffer(dim) for name, dim in vectors.items()}
        self.segments: list[ExpertKey] = []
        self.layouts: list[tuple[int, ...]] = []

    def ensure(self, active: Iterable[ExpertKey], resident: Mapping[ExpertKey, ResidentExpert]) -> Change:
        """Make every active expert a segment. KeyError if one is not resident: a lease was broken."""
        wanted = set(active)
        missing = sorted(wanted.difference(self.segments))
        if not missing:
            return Change(0, repacked=False)
        idle = [key for key in self.segments if key not in wanted]
        if self._rows(idle, resident) > self._rows(wanted, resident):
            self.clear()
            missing = sorted(wanted)
        repacked = not self.segments
        for key in missing:
            self._append(resident[key])
        self._refresh()
        return Change(len(missing), repacked)

    def clear(self) -> None:
        """Drop every segment; the next `ensure` packs anew."""
        self.segments = []
        for matrix in self.matrices.values():
            matrix.clear()
        for vector in self.vectors.values():
            vector.rows = []
        self._refresh()

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
            factors = expert.matrices.get(name)
            buffer.append(factors.a if factors else None, factors.b if factors else None)
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
