"""The engine: plan a step, run it, conclude it. Knows no HTTP and no event loop; one thread calls it."""

import time
from collections import deque
from collections.abc import Sequence as Many

from tokenizers import Tokenizer
from torch import Tensor

from experts.routing import FeatureSpec
from service.core import (
    EngineGauges,
    Failed,
    GenerationRequest,
    Pattern,
    RoutingOutcome,
    StepStats,
    TextDelta,
)
from service.engine.live import Live, Question, Times
from service.engine.model import SharedModel
from service.engine.roster import Roster, StepResult
from service.engine.routing import Dispatcher
from service.engine.runner import Conclusion, Step, run_step
from service.engine.sampler import RowState, sample
from service.engine.text import TextStream
from service.errors import RequestFailedError, TwinserveError
from service.gating.resident import ResidentExpert
from service.scheduler.scheduler import Scheduler
from service.scheduler.sequence import Sequence

_FATAL_AFTER = 8
"""Steps in a row in which every participant failed: the engine then counts as dead."""


class Engine:
    """Continuous batching of requests with different gates.

    Args:
        end_ids: the model's end-of-sequence token ids.
    """

    def __init__(
        self,
        model: SharedModel,
        scheduler: Scheduler,
        dispatcher: Dispatcher,
        backend: Tokenizer,
        end_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.dispatcher = dispatcher
        self._backend = backend
        self._end_ids = end_ids
        self._roster = Roster(model, scheduler, dispatcher.catalogue)
        self._questions: deque[Question] = deque()
        self._failures = 0

    @property
    def busy(self) -> bool:
        """There is something to compute."""
        return bool(self._roster or self._questions)

    @property
    def spec(self) -> FeatureSpec | None:
        """What the router reads."""
        return self.model.spec

    def add(
        self,
        request: GenerationRequest,
        fixed: tuple[Pattern, RoutingOutcome] | None,
        arrived: float,
        result: StepResult,
    ) -> None:
        """Take a request in. `fixed` holds the leased gates where the client named them."""
        try:
            live = self._open(request, arrived)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            if fixed is not None:
                self.release(fixed[0])
            result.events.append((request.id, Failed(_request_fault(error))))
            return
        self._roster.enter(live)
        if fixed is None:
            self._roster.unrouted.append(live)
        else:
            self._roster.start(live, *fixed)

    def ask(self, question: Question) -> None:
        """Queue a question for the router."""
        self._questions.append(question)

    def cancel(self, request_id: str, result: StepResult) -> None:
        """End a request early; unknown or ended ids are ignored."""
        live = self._roster.get(request_id)
        if live is not None:
            self._roster.finish(live, "cancelled", None, result)

    def publish(self, expert: ResidentExpert) -> None:
        """A new generation becomes current; running requests keep theirs."""
        self.model.bank.add(expert)
        self._roster.free(self.dispatcher.catalogue.publish(expert.key))

    def retire(self, name: str) -> None:
        """No new request gets the expert."""
        self._roster.free(self.dispatcher.catalogue.retire(name))

    def release(self, pattern: Pattern) -> None:
        """Give back a lease that no request took over."""
        self._roster.free(self.dispatcher.catalogue.release(pattern))

    def step(self) -> StepResult:
        """One forward pass and everything that follows from it; `broken` is set if steps keep failing."""
        started = time.monotonic()
        step = self._plan()
        conclusion = run_step(self.model, step)
        return self._conclude(step, conclusion, started)

    def fail_all(self, error: TwinserveError, result: StepResult) -> None:
        """End every request with the error: the engine is going away."""
        for live in self._roster.all():
            self._roster.fail(live, error, result)
        while self._questions:
            self._questions.popleft().answer(error)

    def gauges(self, *, alive: bool) -> EngineGauges:
        """A snapshot; safe to read from another thread, if slightly stale."""
        rows = self.scheduler.rows
        cache = self.model.cache
        running = list(self.scheduler.running)
        return EngineGauges(
            running=len(running),
            waiting=len(self.scheduler.waiting) + len(self._roster.unrouted),
            kv_rows_used=rows.count - rows.free,
            kv_rows_total=rows.count,
            kv_tokens_used=sum(sequence.computed for sequence in running),
            kv_tokens_total=rows.count * cache.max_tokens,
            experts_registered=len(self.dispatcher.catalogue.current()),
            experts_resident=self.model.bank.resident_count,
            alive=alive,
        )

    # -- plan ---------------------------------------------------------------------------------------

    def _plan(self) -> Step:
        budget = self.scheduler.prompt_budget()
        routed: list[Live | Question] = []
        tokens = 0
        while self._questions and self._questions[0].withdrawn():
            self._questions.popleft()
        for queue in (self._roster.unrouted, self._questions):
            while queue:
                length = len(self._router_reads(queue[0]))
                if routed and tokens + length > budget.routing:
                    break
                routed.append(queue.popleft())
                tokens += length
        plan = self.scheduler.plan(max(budget.total - tokens, budget.total - budget.routing))
        now = time.monotonic()
        for chunk in plan.prefill:
            live = self._roster.of(chunk.sequence)
            live.times.admitted = live.times.admitted or now
        return Step(plan, routed, [tuple(self._router_reads(item)) for item in routed])

    def _router_reads(self, item: Live | Question) -> Many[int]:
        ids = item.ids if isinstance(item, Question) else item.request.prompt_ids
        return self.spec.cut(ids) if self.spec is not None else ids[-1:]

    # -- conclude -----------------------------------------------------------------------------------

    def _conclude(self, step: Step, conclusion: Conclusion, started: float) -> StepResult:
        result = StepResult()
        gaps: list[float] = []
        generated = 0
        for sequence, error in conclusion.failed:
            self._roster.fail(self._roster.of(sequence), _request_fault(error), result)
        for item, features in conclusion.routed:
            self._routed(item, features, result)
        for sequence, count in conclusion.advanced:
            sequence.computed += count
        if conclusion.logits is not None:
            lives = [self._roster.of(sequence) for sequence in conclusion.sampled]
            now = time.monotonic()
            for live, token in zip(lives, _sample(conclusion.logits, lives), strict=True):
                if isinstance(token, Exception):
                    self._roster.fail(live, _request_fault(token), result)
                    continue
                generated += 1
                if live.times.last_token is None:
                    live.times.first_token = now
                else:
                    gaps.append(now - live.times.last_token)
                live.times.last_token = now
                self._accept(live, token, result)
        self._watch(conclusion, generated, result)
        result.stats = StepStats(
            mode=conclusion.mode,
            seconds=time.monotonic() - started,
            decode_rows=len(step.plan.decode),
            prefill_tokens=sum(chunk.count for chunk in step.plan.prefill),
            generated_tokens=generated,
            active_experts=conclusion.active_experts,
            patterns=conclusion.patterns,
            rebuilt=conclusion.rebuilt,
            inter_token_seconds=tuple(gaps),
            routed_requests=sum(isinstance(item, Live) for item in step.routed),
            route_seconds=time.monotonic() - started if step.routed else 0.0,
        )
        return result

    def _accept(self, live: Live, token: int, result: StepResult) -> None:
        params = live.request.sampling
        sequence = live.sequence
        sequence.tokens.append(token)
        try:
            live.sampling.record(token)
            enough = sequence.generated >= params.min_tokens
            if enough and token in live.sampling.ends:
                stop = token if token in params.stop_token_ids else None
                self._roster.finish(live, "stop", stop, result)
                return
            text = live.text.push(token, may_stop=enough)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self._roster.fail(live, _request_fault(error), result)
            return
        result.events.append((live.id, TextDelta(text, (token,))))
        if live.text.stopped_by is not None:
            self._roster.finish(live, "stop", live.text.stopped_by, result)
        elif sequence.generated >= params.max_tokens:
            self._roster.finish(live, "length", None, result)

    def _routed(self, item: Live | Question, features: Tensor | Exception | None, result: StepResult) -> None:
        if isinstance(item, Question):
            missing = RequestFailedError("this bundle has no router, so prompts have no features")
            item.answer(missing if features is None else features)
            return
        if item.id not in self._roster:
            return
        try:
            if isinstance(features, Exception):
                raise features
            choice = item.request.routing
            pattern, outcome = self.dispatcher.route(_required(features), choice)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self._roster.fail(item, _request_fault(error), result)
            return
        self._roster.start(item, pattern, outcome)

    def _watch(self, conclusion: Conclusion, generated: int, result: StepResult) -> None:
        hopeless = bool(conclusion.failed) and not generated and not conclusion.advanced
        self._failures = self._failures + 1 if hopeless else 0
        if self._failures >= _FATAL_AFTER:
            result.broken = f"{self._failures} steps in a row failed: {conclusion.failed[-1][1]}"

    def _open(self, request: GenerationRequest, arrived: float) -> Live:
        params = request.sampling
        ends = self._end_ids if not params.ignore_eos else frozenset[int]()
        return Live(
            request,
            Sequence(request),
            RowState.start(params, request.prompt_ids, ends | params.stop_token_ids),
            TextStream(self._backend, request.prompt_ids, params.stop),
            Times(arrived),
        )


def _sample(logits: Tensor, lives: Many[Live]) -> Many[int | Exception]:
    """Tokens for all rows; if the batch cannot be sampled as one, each row by itself."""
    try:
        return sample(logits, [live.sampling for live in lives])
    except Exception:  # noqa: BLE001 found again below, row by row
        chosen: list[int | Exception] = []
        for row, live in enumerate(lives):
            try:
                chosen.extend(sample(logits[row : row + 1], [live.sampling]))
            except Exception as error:  # noqa: BLE001 belongs to this row alone
                chosen.append(error)
        return chosen


def _required(features: Tensor | None) -> Tensor:
    if features is None:
        raise RequestFailedError("this bundle has no router; name an expert as model, or give gates")
    return features


def _request_fault(error: Exception) -> TwinserveError:
    if isinstance(error, TwinserveError):
        return error
    return RequestFailedError(f"{type(error).__name__} while generating: {error}")
