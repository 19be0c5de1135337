"""How far a job is: shares of stages → percent that never fall, and how long it will take."""

import time
from collections.abc import Callable

from experts.registry.records import Progress
from experts.registry.work import Step

_SPANS = {
    "fetch": (0.0, 15.0),
    "check": (15.0, 25.0),
    "compress": (25.0, 75.0),
    "build": (0.0, 75.0),
    "route": (75.0, 85.0),
    "store": (85.0, 92.0),
    "try": (92.0, 97.0),
    "publish": (97.0, 99.9),
}
"""Stage → percent of the job at its begin and end; the hundredth is the catalogue's to give."""

_FIRST_PERCENT = 2.0
"""Before so much is done nobody can tell how long the rest will take."""


class Gauge:
    """One attempt's progress.

    Args:
        reached: percent of an earlier attempt; the job never falls below them.
        clock: monotonic seconds.
    """

    def __init__(self, reached: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._reached = reached
        self._from: float | None = None
        self._percent = 0.0
        self._stage = ""
        self._tensor = ""

    @property
    def stage(self) -> str:
        """What is being done; empty before the first stage."""
        return self._stage

    def at(self, stage: str, share: float = 0.0, tensor: str = "") -> None:
        """A share, 0 to 1, of a stage is done."""
        begin, end = _SPANS.get(stage, (self._percent, self._percent))
        if self._from is None:
            self._from = begin
        self._stage, self._tensor = stage, tensor
        self._percent = max(self._percent, begin + (end - begin) * min(max(share, 0.0), 1.0))

    def follow(self, step: Step) -> None:
        """What the worker says."""
        self.at(step.stage, step.share, step.tensor)

    def now(self) -> Progress:
        """For the catalogue."""
        done = self._percent - (self._from or 0.0)
        eta = None
        if done >= _FIRST_PERCENT:
            eta = round((self._clock() - self._began) / done * (100.0 - self._percent), 1)
        return Progress(round(max(self._percent, self._reached), 1), self._stage, self._tensor, eta)
