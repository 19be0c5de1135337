"""The live requests of an engine, from acceptance to the one terminal event that each gets."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.core import (
    Event,
    ExpertKey,
    Failed,
    Finished,
    FinishReason,
    Pattern,
    RequestStats,
    RoutingOutcome,
    StepStats,
    TextDelta,
)
from service.engine.live import Live
from service.engine.model import SharedModel
from service.errors import TwinserveError
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Scheduler
from service.scheduler.sequence import Sequence


@dataclass(slots=True)
class StepResult:
    """What a step made: events by request id in order, and statistics.

    Attributes:
        broken: set when the engine is beyond help; the events must still be delivered.
    """

    events: list[tuple[str, Event]] = field(default_factory=list)
    ended: list[RequestStats] = field(default_factory=list)
    stats: StepStats | None = None
    broken: str | None = None


class Roster:
    """Who is live, and how they come and go. However a request ends, its row and its lease are given back.

    Attributes:
        unrouted: requests that wait for the router's word, in order of arrival.
    """

    def __init__(self, model: SharedModel, scheduler: Scheduler, catalogue: Catalogue) -> None:
        self._model = model
        self._scheduler = scheduler
        self._catalogue = catalogue
        self._live: dict[str, Live] = {}
        self._by_sequence: dict[int, Live] = {}
        self.unrouted: deque[Live] = deque()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def get(self, request_id: str) -> Live | None:
        """The live request of that id."""
        return self._live.get(request_id)

    def of(self, sequence: Sequence) -> Live:
        """The live request behind a scheduled sequence."""
        return self._by_sequence[id(sequence)]

    def all(self) -> list[Live]:
        """Every live request."""
        return list(self._live.values())

    def enter(self, live: Live) -> None:
        """Take a request in."""
        self._live[live.id] = live
        self._by_sequence[id(live.sequence)] = live

    def start(self, live: Live, pattern: Pattern, outcome: RoutingOutcome) -> None:
        """Its gates are known and leased: queue it for a row."""
        live.pattern = live.sequence.pattern = pattern
        live.outcome = outcome
        live.times.routed = time.monotonic()
        self._scheduler.add(live.sequence)

    def finish(
        self, live: Live, reason: FinishReason, stop_reason: str | int | None, result: StepResult
    ) -> None:
        """End a request well; text that was held back for a stop string comes out first."""
        if reason != "cancelled" and live.text.stopped_by is None:
            rest = live.text.finish()
            if rest:
                result.events.append((live.id, TextDelta(rest, ())))
        result.events.append((live.id, Finished(reason, live.usage, live.outcome, stop_reason)))
        self._drop(live, reason, result)

    def fail(self, live: Live, error: TwinserveError, result: StepResult) -> None:
        """End a request in an error."""
        result.events.append((live.id, Failed(error)))
        self._drop(live, "error", result)

    def free(self, keys: Iterable[ExpertKey]) -> None:
        """Give back the memory of generations that nobody needs."""
        for key in keys:
            self._model.bank.remove(key)

    def _drop(self, live: Live, reason: str, result: StepResult) -> None:
        row = live.sequence.row
        if row is not None and reason not in ("stop", "length"):
            # Nobody has looked at all of its values: NaN would reach the row's next sequence through
            # masked positions.
            self._model.cache.wipe(row, len(live.sequence.tokens))
        self._scheduler.remove(live.sequence)
        if live in self.unrouted:
            self.unrouted.remove(live)
        del self._live[live.id]
        del self._by_sequence[id(live.sequence)]
        if live.pattern is not None:
            self.free(self._catalogue.release(live.pattern))
        result.ended.append(live.stats(reason))
