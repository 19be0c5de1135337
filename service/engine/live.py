"""What the engine keeps of one live request beside the scheduler's integers, and of one router question."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from service.core import GenerationRequest, Pattern, RequestStats, RoutingOutcome, TokenLogprobs, Usage
from service.engine.pooling import Pool
from service.engine.sampling.state import RowState
from service.engine.text import TextStream
from service.scheduler.sequence import Sequence


@dataclass(slots=True)
class Times:
    """Monotonic seconds at which a request reached its stages."""

    arrived: float
    routed: float | None = None
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Live:
    """A request inside the engine.

    Attributes:
        outcome: gates and generations; set by routing, or at once when the client named the gates.
        pattern: the lease that must be given back at the end.
        prompt: log-probabilities of the prompt's tokens but the first, as far as they are known.
        merged: tokens that materialised weights made; of the prompt, where it is pooled.
        pool: of a request that generates nothing.
    """

    request: GenerationRequest
    sequence: Sequence
    sampling: RowState
    text: TextStream
    times: Times
    pattern: Pattern | None = None
    outcome: RoutingOutcome | None = None
    prompt: list[TokenLogprobs] = field(default_factory=list)
    merged: int = 0
    pool: Pool | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def lot(self) -> str:
        """The id that decides which trial it belongs to: parallel choices go together."""
        return self.request.leader or self.request.id

    @property
    def was_routed(self) -> bool:
        """The router chose its gates."""
        return self.request.routing.gates is None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.sequence.prompt_length, self.sequence.generated, self.sequence.cached)

    @property
    def told(self) -> RoutingOutcome | None:
        """What the answer says of its gates."""
        made = self.sequence.generated if self.pool is None else self.sequence.prompt_length
        if self.outcome is not None and 2 * self.merged > made:
            return replace(self.outcome, mode="merged")
        return self.outcome

    def stats(self, reason: str) -> RequestStats:
        """Times and counts at the end."""
        now, times = time.monotonic(), self.times
        usage = self.usage

        def between(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else end - start

        # A pool is all prefill.
        pooled = now if self.pool is not None and self.pool.value is not None else None

        return RequestStats(
            reason=reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            queue_seconds=between(times.arrived, times.admitted),
            route_seconds=between(times.arrived, times.routed) if self.was_routed else None,
            prefill_seconds=between(times.admitted, times.first_token or pooled),
            decode_seconds=between(times.first_token, now),
            first_token_seconds=between(times.arrived, times.first_token),
            total_seconds=now - times.arrived,
            gates=dict(self.outcome.gates) if self.outcome else {},
            abstained=self.outcome is not None and self.outcome.abstained,
            generations=dict(self.outcome.generations) if self.outcome else {},
            trial=self.outcome.trial if self.outcome else None,
            leads=self.request.leader is None,
            origin=self.request.origin,
        )


@dataclass(slots=True, eq=False)
class Question:
    """A prompt whose router features are wanted without generating.

    Attributes:
        ids: the tokens that the router reads.
        answer: called on the engine thread with the features (d,) float32, or with the error.
        withdrawn: whether nobody waits for the answer any more.
    """

    ids: tuple[int, ...]
    answer: Callable[[Tensor | Exception], None]
    withdrawn: Callable[[], bool] = bool
