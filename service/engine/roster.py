"""The live requests of an engine, from acceptance to the one terminal event that each gets."""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from service.core import (
    Event,
    ExpertKey,
    Failed,
    Finished,
    FinishReason,
    RequestStats,
    StepStats,
    TextDelta,
)
from service.engine.live import Live
from service.errors import DeadlineExceededError, TwinserveError
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Scheduler
from service.scheduler.sequence import Sequence


@dataclass(slots=True)
class StepResult:
    """What a step made: events by request id in order, and statistics.

    Attributes:
        generated: tokens.
        gaps: seconds between two tokens of one sequence.
        broken: set when the engine is beyond help; the events must still be delivered.
    """

    events: list[tuple[str, Event]] = field(default_factory=list)
    ended: list[RequestStats] = field(default_factory=list)
    generated: int = 0
    gaps: list[float] = field(default_factory=list)
    stats: StepStats | None = None
    broken: str | None = None


class Roster:
    """Who is live, and how they come and go. However a request ends, its blocks and its lease are given back.

    Args:
        forget: called with generations that nobody needs any more.
        wipe: called with (KV group, block) pairs whose values may not be finite.

    Attributes:
        unrouted: requests that wait for the router's word, in order of arrival.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        catalogue: Catalogue,
        forget: Callable[[ExpertKey], None],
        wipe: Callable[[Many[tuple[int, int]]], None],
    ) -> None:
        self._scheduler = scheduler
        self._catalogue = catalogue
        self._forget = forget
        self._wipe = wipe
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

    def has(self, sequence: Sequence) -> bool:
        """The sequence's request is live."""
        return id(sequence) in self._by_sequence

    def of(self, sequence: Sequence) -> Live:
        """The live request behind a sequence."""
        return self._by_sequence[id(sequence)]

    def all(self) -> list[Live]:
        """Every live request."""
        return list(self._live.values())

    def enter(self, live: Live) -> None:
        """Take a request in."""
        self._live[live.id] = live
        self._by_sequence[id(live.sequence)] = live

    def finish(
        self, live: Live, reason: FinishReason, stop_reason: str | int | None, result: StepResult
    ) -> None:
        """End a request well; text that was held back for a stop string comes out first."""
        if reason != "cancelled" and live.text.stopped_by is None:
            rest = live.text.finish()
            if rest:
                result.events.append((live.id, TextDelta(rest, ())))
        prompt = tuple(live.prompt) if live.request.sampling.prompt_logprobs is not None else None
        pooled = live.pool.value if live.pool is not None and reason != "cancelled" else None
        end = Finished(reason, live.usage, live.told, stop_reason, prompt, pooled)
        result.events.append((live.id, end))
        self._drop(live, reason, result)

    def fail(self, live: Live, error: TwinserveError, result: StepResult) -> None:
        """End a request in an error."""
        result.events.append((live.id, Failed(error)))
        self._drop(live, "timeout" if isinstance(error, DeadlineExceededError) else "error", result)

    def free(self, keys: Iterable[ExpertKey]) -> None:
        """Give back the memory of generations that nobody needs."""
        for key in keys:
            self._forget(key)

    def _drop(self, live: Live, reason: str, result: StepResult) -> None:
        # Nothing that a failed request computed is trusted: it is not found
        # again, and it is wiped, since NaN would reach a block's next owner through masked positions.
        unproven = self._scheduler.remove(live.sequence, reusable=reason != "error")
        if unproven:
            self._wipe(unproven)
        if live in self.unrouted:
            self.unrouted.remove(live)
        del self._live[live.id]
        del self._by_sequence[id(live.sequence)]
        if live.pattern is not None:
            self.free(self._catalogue.release(live.pattern))
        result.ended.append(live.stats(reason))
