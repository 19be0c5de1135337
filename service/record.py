"""What is known of the HTTP request that is being served: for its log line, its limits and its trace. No HTTP here.

The request's own task and those that it starts find it by `current`; the engine's statistics carry it back as the
`origin` of each sequence. Texts of prompts and answers are never part of it.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from service.core import Event, Failed, GenerationRequest, RequestStats, RoutingOutcome, TextDelta

_PATTERNS_TOLD = 8

_current: ContextVar["RequestRecord | None"] = ContextVar("request_record", default=None)


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request, as far as it has come.

    Attributes:
        request_id: answered as X-Request-Id.
        arrived: monotonic seconds.
        key: the id of its key; empty without one.
        model: as the body names it; empty where it names none.
        operation: in the words of OpenTelemetry's GenAI conventions; empty where it generates nothing.
        first_token: monotonic seconds.
        reasons: why each sequence ended, as far as the answer got.
        on_ended: told of each sequence when it has ended, on the engine's thread.
    """

    request_id: str
    arrived: float
    key: str = ""
    model: str = ""
    operation: str = ""
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    reasons: list[str] = field(default_factory=list)
    patterns: dict[str, None] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    on_ended: list[Callable[[RequestStats], None]] = field(default_factory=list)

    def admitted(self, request: GenerationRequest) -> None:
        """Count a sequence that was queued; the prompt of several choices counts once."""
        self.sequences += 1
        if request.leader is None:
            self.prompt_tokens += len(request.prompt_ids)

    def saw(self, event: Event) -> None:
        """Count an event on its way to the client."""
        if isinstance(event, TextDelta):
            self.completion_tokens += len(event.token_ids)
            if self.first_token is None and event.token_ids:
                self.first_token = time.monotonic()
            return
        if isinstance(event, Failed):
            self.reasons.append(event.error.code)
            return
        self.reasons.append(event.reason)
        if event.routing is not None:
            self.routed(event.routing)

    def routed(self, outcome: RoutingOutcome) -> None:
        """Note what gates an answer was made with."""
        if len(self.patterns) < _PATTERNS_TOLD:
            self.patterns[outcome.pattern] = None
            self.generations.update(outcome.generations)


def current() -> RequestRecord | None:
    """The request that this code runs for."""
    return _current.get()


def enter(record: RequestRecord) -> None:
    """From here on this task runs for that request."""
    _current.set(record)
