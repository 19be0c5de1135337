"""How requests come to their gates and into the scheduler's line, and what may end them on the way."""

import time

from torch import Tensor

from service.core import GenerationRequest, Pattern, RoutingOutcome
from service.engine.live import Live, Question, Times
from service.engine.parts import EngineParts
from service.engine.pooling import Pool
from service.engine.roster import Roster, StepResult
from service.engine.sampling.constrain import Constrain, run_of
from service.engine.sampling.restrict import restrictions
from service.engine.sampling.state import RowState
from service.engine.text import TextStream
from service.errors import DeadlineExceededError, RequestFailedError, as_request_error
from service.scheduler.sequence import Sequence


class Intake:
    """Everything before a request's first step: gates, leases, experts, deadlines, parallel choices."""

    def __init__(self, parts: EngineParts, roster: Roster) -> None:
        self._parts = parts
        self._roster = roster
        self._parties: dict[str, list[Live]] = {}

    def open(self, request: GenerationRequest, arrived: float) -> Live:
        """A request's state before anything has happened."""
        params = request.sampling
        run = run_of(request)
        # With a grammar they come where it ends, also where they are to be ignored until then.
        ends = frozenset[int]() if params.ignore_eos and run is None else self._parts.end_ids
        edits = restrictions(params)
        if run is not None:
            edits = (*edits, Constrain(run, min_tokens=params.min_tokens, ignore_eos=params.ignore_eos))
        return Live(
            request,
            Sequence(request),
            RowState.start(params, request.prompt_ids, ends | params.stop_token_ids, edits, run),
            TextStream(
                self._parts.backend,
                request.prompt_ids,
                params.stop,
                include_stop=params.include_stop,
                skip_special=params.skip_special,
            ),
            Times(arrived),
            pool=Pool(request.pooling) if request.pooling is not None else None,
        )

    def begin(self, live: Live, fixed: tuple[Pattern, RoutingOutcome] | None, result: StepResult) -> None:
        """Queue a request that has entered: for its blocks if its gates are known, else for the router."""
        if fixed is not None:
            self._start(live, *fixed, result)
            return
        leader = self._roster.get(live.request.leader or "")
        if leader is None:
            self._route(live, result)
        elif leader.pattern is not None and leader.outcome is not None:
            self._follow(live, leader.pattern, leader.outcome, result)
        else:
            self._parties.setdefault(leader.id, []).append(live)

    def routed(self, item: Live | Question, features: Tensor | Exception | None, result: StepResult) -> None:
        """The router's input of a question or a request has been computed."""
        if isinstance(item, Question):
            missing = RequestFailedError("this bundle has no router, so prompts have no features")
            item.answer(missing if features is None else features)
            return
        if item.id not in self._roster:
            return
        try:
            if isinstance(features, Exception):
                raise features
            # What is pooled is compared with other pools and never rated: nothing is tried out on it.
            pattern, outcome = self._parts.dispatcher.route(
                _required(features), item.request.routing, explore=item.pool is None, request_id=item.lot
            )
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self.fail(item, error, result)
            return
        self._start(item, pattern, outcome, result)
        self._lead(item, result)

    def decide(self, sequence: Sequence, features: Tensor) -> Pattern:
        """The gates of a sequence that is in the middle of its own prefill; asked again, the same."""
        live = self._roster.of(sequence)
        if live.pattern is None:
            live.pattern, live.outcome = self._parts.dispatcher.route(
                features, live.request.routing, request_id=live.lot
            )
            live.times.routed = time.monotonic()
        return live.pattern

    def settled(self, live: Live, result: StepResult) -> None:
        """A single-pass prefill went well: its gates hold from now on."""
        if live.sequence.unrouted:
            live.sequence.pattern = live.pattern
            self._lead(live, result)

    def ended(self, live: Live, result: StepResult) -> None:
        """A request is gone; who waited for its gates is routed alone."""
        party = [each for each in self._parties.pop(live.id, []) if each.id in self._roster]
        for follower in party:
            self._route(follower, result)

    def clear(self) -> None:
        """Every request is gone."""
        self._parties.clear()

    def expire(self, now: float, result: StepResult) -> None:
        """End what has outlived its deadline."""
        late = [self._roster.of(sequence) for sequence in self._parts.scheduler.expired(now)]
        waiting = [*self._roster.unrouted, *(live for party in self._parties.values() for live in party)]
        for live in waiting:
            deadline = live.request.deadline
            if deadline is not None and deadline <= now and live.id in self._roster:
                late.append(live)
        for live in late:
            seconds = now - live.times.arrived
            self.fail(
                live,
                DeadlineExceededError(
                    f"the request did not end within its timeout: {live.sequence.generated} tokens in "
                    f"{seconds:.1f} s; raise timeout, or ask for fewer tokens",
                    param="timeout",
                ),
                result,
            )

    def fetch(self, result: StepResult) -> None:
        """Bring the experts of waiting sequences in; end those whose experts cannot be had."""
        scheduler = self._parts.scheduler
        settled = self._parts.residency.settle(scheduler.waiting_patterns())
        if not settled.failed:
            return
        for live in self._roster.all():
            if live.sequence not in scheduler.waiting or live.pattern is None:
                continue
            broken = next(
                (settled.failed[key] for key, _ in live.pattern.gates if key in settled.failed), None
            )
            if broken is not None:
                self.fail(live, broken, result)

    def _route(self, live: Live, result: StepResult) -> None:
        parts, length = self._parts, live.sequence.prompt_length
        spec = parts.model.spec
        if (
            parts.single_pass
            and spec is not None
            and spec.layer != -1
            and length <= spec.max_tokens
            and live.request.sampling.prompt_logprobs is None
            and live.pool is None
            and parts.residency.complete(len(parts.dispatcher.catalogue.current()))
            and parts.scheduler.fits_single_pass(length)
        ):
            live.sequence.single_pass = True
            self._queue(live, result)
        else:
            self._roster.unrouted.append(live)

    def _start(self, live: Live, pattern: Pattern, outcome: RoutingOutcome, result: StepResult) -> None:
        """Its gates are known and leased: queue it for its blocks."""
        live.pattern = live.sequence.pattern = pattern
        live.outcome = outcome
        live.times.routed = time.monotonic()
        try:
            self._parts.residency.expect(pattern)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self.fail(live, error, result)
            return
        self._queue(live, result)

    def _queue(self, live: Live, result: StepResult) -> None:
        try:
            self._parts.scheduler.add(live.sequence, time.monotonic())
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self.fail(live, error, result)

    def _lead(self, live: Live, result: StepResult) -> None:
        assert live.outcome is not None
        for follower in self._parties.pop(live.id, []):
            if follower.id in self._roster and live.pattern is not None:
                self._follow(follower, live.pattern, live.outcome, result)

    def _follow(self, live: Live, pattern: Pattern, outcome: RoutingOutcome, result: StepResult) -> None:
        self._parts.dispatcher.catalogue.share(pattern)
        leader = self._roster.get(live.request.leader or "")
        live.sequence.single_pass = leader is not None and leader.sequence.single_pass
        self._start(live, pattern, outcome, result)

    def fail(self, live: Live, error: Exception, result: StepResult) -> None:
        """End a request in an error, wherever it is."""
        self._roster.fail(live, as_request_error(error), result)
        self.ended(live, result)


def _required(features: Tensor | None) -> Tensor:
    if features is None:
        raise RequestFailedError("this bundle has no router; name an expert as model, or give gates")
    return features
