"""What the router reads in one packed pass: pooled states of every layer that its spec names, lowest first.

Knows which rows of the pack belong to whom; runs no layer and sets no gate.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from experts.routing import FeatureSpec, pool
from service.engine.layout import Segment

Settle = Callable[[Tensor], Sequence[bool]]
"""Pooled states (prompts, d) float32 of the first tap → for whom the router needs to read no further."""


class Reading:
    """Fills up as the pass goes through the layers.

    Args:
        segments: prompts that are read for the router alone.
        late: runs of prompts in prefill that are read too, by index of the run.

    Attributes:
        segments: where those prompts lie that are read on.
    """

    def __init__(
        self, spec: FeatureSpec, segments: Sequence[Segment], late: Mapping[int, Segment] | None = None
    ) -> None:
        self.segments = tuple(segments)
        self._spec = spec
        self._late = late or {}
        self._numbers = list(range(len(segments)))
        self._seen: list[list[Tensor]] = [[] for _ in segments]
        self._seen_late: dict[int, list[Tensor]] = {index: [] for index in self._late}

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers to read below the last one."""
        return self._spec.taps

    @property
    def first(self) -> bool:
        """One layer has been read, and there are more."""
        seen = self._seen[self._numbers[0]] if self._numbers else ()
        return len(seen) == 1 < self._spec.parts

    def take(self, hidden: Tensor, begin: int = 0) -> None:
        """Read the next layer's output (tokens, hidden), whose first row is token `begin` of the pack."""
        for number, part in zip(self._numbers, self.segments, strict=True):
            self._seen[number].append(self._pooled(hidden, part, begin))
        for index, part in self._late.items():
            self._seen_late[index].append(self._pooled(hidden, part, begin))

    def settled(self, settle: Settle) -> list[bool]:
        """Whether what has been read of each prompt is enough."""
        return list(settle(torch.stack([self._seen[number][0] for number in self._numbers]).cpu()))

    def leave(self, gone: Sequence[bool]) -> list[int]:
        """Read on without those, the others moved together: rows of the pack that remain of all segments."""
        rows: list[int] = []
        segments: list[Segment] = []
        numbers: list[int] = []
        start = self.segments[0].begin if self.segments else 0
        for number, part, left in zip(self._numbers, self.segments, gone, strict=True):
            if left:
                continue
            begin = start + len(rows)
            rows.extend(range(part.begin, part.end))
            segments.append(Segment(begin, start + len(rows)))
            numbers.append(number)
        self.segments, self._numbers = tuple(segments), numbers
        return rows

    def features(self) -> Tensor | None:
        """(segments, d) float32, NaN in the layers that were not read; None if there was nobody to read for."""
        if not self._seen:
            return None
        return torch.stack([self._joined(parts) for parts in self._seen])

    def late(self, index: int) -> Tensor:
        """(d,) float32 on the CPU, of a prompt in prefill."""
        return self._joined(self._seen_late[index]).cpu()

    def _pooled(self, hidden: Tensor, part: Segment, begin: int) -> Tensor:
        return pool(hidden[part.begin - begin : part.end - begin], self._spec.pooling)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        missing = self._spec.parts - len(parts)
        return torch.cat([*parts, *[torch.full_like(parts[0], torch.nan)] * missing])
