"""Who has run out of the time that it set itself."""

import math

from service.scheduler.sequence import Sequence


class Deadlines:
    """Costs one comparison a step until somebody is late."""

    def __init__(self) -> None:
        self._deadlines: dict[Sequence, float] = {}
        self._soonest = math.inf

    def __len__(self) -> int:
        return len(self._deadlines)

    def watch(self, sequence: Sequence) -> None:
        """Note a sequence's deadline, if it has one."""
        deadline = sequence.request.deadline
        if deadline is not None:
            self._deadlines[sequence] = deadline
            self._soonest = min(self._soonest, deadline)

    def drop(self, sequence: Sequence) -> None:
        """The sequence has ended. `_soonest` may now be too early: one look in vain."""
        self._deadlines.pop(sequence, None)

    def passed(self, now: float) -> list[Sequence]:
        """Whose deadline has come, soonest first; each is told once."""
        if now < self._soonest:
            return []
        late = [sequence for sequence, deadline in self._deadlines.items() if deadline <= now]
        late.sort(key=self._deadlines.__getitem__)
        for sequence in late:
            del self._deadlines[sequence]
        self._soonest = min(self._deadlines.values(), default=math.inf)
        return late
