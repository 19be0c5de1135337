"""The experts of the running sequences, and what a newcomer would add to them: one step's view."""

from collections.abc import Callable, Iterable

from service.core import ExpertKey, Pattern
from service.scheduler.sequence import Sequence


class ActiveExperts:
    """Made anew for each round of admissions; every pattern is looked at once.

    Args:
        running: whose experts are active.
        bound: distinct experts that should run together; None is no bound.
        resident: whether a pattern's experts are in their slots.
    """

    def __init__(
        self, running: Iterable[Sequence], bound: int | None, resident: Callable[[Pattern], bool]
    ) -> None:
        self._bound = bound
        self._resident = resident
        self._ready: dict[bytes, bool] = {}
        self._active: set[ExpertKey] = set()
        if bound is not None:
            for sequence in running:
                self.join(sequence)

    def ready(self, sequence: Sequence) -> bool:
        """Its experts are in their slots, or not known yet."""
        if sequence.pattern is None:
            return True
        ready = self._ready.get(sequence.root)
        if ready is None:
            ready = self._ready[sequence.root] = self._resident(sequence.pattern)
        return ready

    def widens(self, sequence: Sequence) -> bool:
        """It would bring new experts into a set that then is larger than it should be."""
        if self._bound is None or sequence.pattern is None:
            return False
        fresh = sum(key not in self._active for key, _ in sequence.pattern.gates)
        return fresh > 0 and len(self._active) + fresh > self._bound

    def join(self, sequence: Sequence) -> None:
        """The sequence runs."""
        if sequence.pattern is not None:
            self._active.update(key for key, _ in sequence.pattern.gates)
