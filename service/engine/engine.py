"""The engine: plan a step, run it, conclude it. Knows no HTTP and no event loop; one thread calls it."""

import time
from collections import deque
from collections.abc import Sequence as Many

from torch import Tensor

from experts.bundle import ExpertWeights
from experts.routing import FeatureSpec
from service.core import (
    EngineGauges,
    ExpertKey,
    Failed,
    FinishReason,
    GenerationRequest,
    Pattern,
    RoutingOutcome,
    StepMode,
    StepStats,
    TextDelta,
)
from service.engine.change import PreparedChange
from service.engine.intake import Intake
from service.engine.live import Live, Question
from service.engine.parts import EngineParts
from service.engine.roster import Roster, StepResult
from service.engine.runner import Conclusion, PooledRows, PromptRows, Step, run_step
from service.engine.sampling.logprobs import prompt_logprobs
from service.engine.sampling.sample import Chosen, sample
from service.engine.trials import Trial
from service.errors import TwinserveError, as_request_error
from service.gating.resident import ResidentExpert

_FATAL_AFTER = 8
"""Steps in a row in which every participant failed: the engine then counts as dead."""


class Engine:
    """Continuous batching of requests with different gates."""

    def __init__(self, parts: EngineParts) -> None:
        self.model = parts.model
        self.scheduler = parts.scheduler
        self.dispatcher = parts.dispatcher
        self.residency = parts.residency
        self.merged = parts.merged
        self.end_ids = parts.end_ids
        self._correction = parts.correction
        self._roster = Roster(
            parts.scheduler, parts.dispatcher.catalogue, self._forget, parts.model.cache.wipe
        )
        self._intake = Intake(parts, self._roster)
        self._questions: deque[Question] = deque()
        self._asking: list[Question] = []
        self._failures = 0
        self.stalled = False

    @property
    def busy(self) -> bool:
        """There is something to compute, or, if `stalled`, to wait for."""
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
            live = self._intake.open(request, arrived)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            if fixed is not None:
                self.release(fixed[0])
            result.events.append((request.id, Failed(as_request_error(error))))
            return
        self._roster.enter(live)
        self._intake.begin(live, fixed, result)

    def ask(self, question: Question) -> None:
        """Queue a question for the router."""
        self._questions.append(question)

    def cancel(self, request_id: str, result: StepResult) -> None:
        """End a request early; unknown or ended ids are ignored."""
        live = self._roster.get(request_id)
        if live is not None:
            self._finish(live, "cancelled", None, result)

    def apply(self, change: PreparedChange) -> None:
        """Experts, router and trials change together; running requests keep the generations that they have.

        If it raises, nothing has changed.
        """
        catalogue = self.dispatcher.catalogue
        self._make_room(change)
        self._place(change.residents)
        trials = [trial.key for trial in change.trials.all if self._has(trial, change)]
        freed = catalogue.switch(change.publish, change.retire, trials)
        self.dispatcher.direct(change.router, change.trials)
        held = catalogue.held()
        for weights in change.weights:
            if held.get(ExpertKey(weights.name, weights.generation)) == "trial":
                self.residency.loader.keep(weights)
        for key in change.publish:
            self.residency.loader.discard(key)
        self._roster.free(freed)

    def stage(self, expert: ResidentExpert, weights: ExpertWeights) -> None:
        """Keep a generation for requests that name it."""
        self._place([expert])
        self.residency.loader.keep(weights)
        self.dispatcher.catalogue.stage(expert.key)

    def unstage(self, key: ExpertKey) -> None:
        """Keep it no more, unless it is current, tried out or used."""
        self._roster.free(self.dispatcher.catalogue.unstage(key))

    def release(self, pattern: Pattern) -> None:
        """Give back a lease that no request took over."""
        self._roster.free(self.dispatcher.catalogue.release(pattern))

    def step(self) -> StepResult:
        """One forward pass and everything that follows from it; `broken` is set if steps keep failing."""
        started, result = time.monotonic(), StepResult()
        step = self._plan(started, result)
        conclusion = run_step(self.model, step, self.merged, self._correction)
        self._conclude(step, conclusion, result)
        self.stalled = not step.participants
        if step.participants:
            result.stats = self._stats(step, conclusion, result, time.monotonic() - started)
        return result

    def fail_all(self, error: TwinserveError, result: StepResult) -> None:
        """End every request with the error: the engine is going away."""
        for live in self._roster.all():
            self._roster.fail(live, error, result)
        self._intake.clear()
        self._questions.extendleft(self._asking)
        self._asking = []
        while self._questions:
            self._questions.popleft().answer(error)

    def gauges(self, *, alive: bool) -> EngineGauges:
        """A snapshot; safe to read from another thread, if slightly stale."""
        kv, residency = self.scheduler.kv, self.residency.stats
        return EngineGauges(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self._roster.unrouted),
            kv_blocks_used=kv.used_blocks,
            kv_blocks_cached=kv.cached_blocks,
            kv_blocks_total=kv.total_blocks,
            prefix_queries=kv.queries,
            prefix_hits=kv.hits,
            experts_registered=len(self.dispatcher.catalogue.current()),
            experts_resident=self.model.bank.resident_count,
            experts_staged=sum(reach != "active" for reach in self.dispatcher.catalogue.held().values()),
            router=self.dispatcher.baseline,
            expert_loads=residency.loads,
            expert_evictions=residency.evictions,
            expert_hits=residency.hits,
            expert_misses=residency.misses,
            merged_bytes=self.merged.stats.nbytes if self.merged is not None else 0,
            alive=alive,
        )

    # -- change -------------------------------------------------------------------------------------

    def _make_room(self, change: PreparedChange) -> None:
        """Slots of generations that the change ends: theirs may be the only ones for those that come."""
        if not (self.residency.pool.limited and change.residents):
            return
        catalogue = self.dispatcher.catalogue
        names = {key.name for key in change.publish}.union(change.retire)
        leases = catalogue.leases()
        for name, key in catalogue.current().items():
            if name in names and key not in change.publish and not leases.get(key):
                self.residency.vacate(key)

    def _place(self, experts: Many[ResidentExpert]) -> None:
        """Give experts their slots, all or none."""
        placed: list[ExpertKey] = []
        try:
            for expert in experts:
                placed.append(expert.key)
                self.residency.publish(expert)
        except BaseException:
            known = self.dispatcher.catalogue.leases()
            self._roster.free(key for key in placed if key not in known)
            raise

    def _has(self, trial: Trial, change: PreparedChange) -> bool:
        """Whether requests can be answered with a trial's generation; a shadow's may be nowhere at all."""
        return (
            trial.kind == "canary"
            or trial.key in self.dispatcher.catalogue.leases()
            or any(trial.key == expert.key for expert in change.residents)
        )

    # -- plan ---------------------------------------------------------------------------------------

    def _plan(self, now: float, result: StepResult) -> Step:
        self._intake.expire(now, result)
        self._intake.fetch(result)
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
        # Should the step die, these are still answered.
        self._asking = [item for item in routed if isinstance(item, Question)]
        plan = self.scheduler.plan(max(budget.total - tokens, budget.total - budget.routing), now)
        for chunk in plan.prefill:
            live = self._roster.of(chunk.sequence)
            live.times.admitted = live.times.admitted or now
        reads = [tuple(self._router_reads(item)) for item in routed]
        return Step(plan, routed, reads, self._intake.decide, self._settles)

    def _settles(self, items: Many[Live | Question], features: Tensor) -> list[bool]:
        """Questions want all features, whatever the router says of them, and so do other routers than the current."""
        own = [isinstance(item, Live) and self.dispatcher.trials.of(item.lot) is None for item in items]
        if not any(own):
            return own
        return [mine and done for mine, done in zip(own, self.dispatcher.settles(features), strict=True)]

    def _router_reads(self, item: Live | Question) -> Many[int]:
        ids = item.ids if isinstance(item, Question) else item.request.prompt_ids
        return self.spec.cut(ids) if self.spec is not None else ids[-1:]

    # -- conclude -----------------------------------------------------------------------------------

    def _conclude(self, step: Step, conclusion: Conclusion, result: StepResult) -> None:
        for sequence, error in conclusion.failed:
            self._intake.fail(self._roster.of(sequence), error, result)
        for item, features in conclusion.routed:
            if isinstance(item, Question):
                self._asking.remove(item)
            self._intake.routed(item, features, result)
        pooled = [live for rows in conclusion.pooled if (live := self._pool(rows, conclusion, result))]
        if conclusion.logits is not None:
            for rows in conclusion.prompts:
                self._prompt(rows, conclusion.logits, result)
            self._tokens(conclusion, result)
        else:
            self._advance(conclusion, result)
        for live in pooled:
            if live.id in self._roster:
                self._finish(live, "stop", None, result)
        hopeless = bool(conclusion.failed) and not conclusion.advanced
        self._failures = self._failures + 1 if hopeless else 0
        if self._failures >= _FATAL_AFTER:
            result.broken = f"{self._failures} steps in a row failed: {conclusion.failed[-1][1]}"

    def _tokens(self, conclusion: Conclusion, result: StepResult) -> None:
        assert conclusion.logits is not None
        pairs = [(self._roster.of(s), row) for s, row in conclusion.sampled if self._roster.has(s)]
        rows = [row for _, row in pairs]
        logits = conclusion.logits if len(rows) == len(conclusion.logits) else conclusion.logits[rows]
        chosen = sample(logits, [live.sampling for live, _ in pairs]) if pairs else []
        for (live, _), token in zip(pairs, chosen, strict=True):
            if isinstance(token, Exception):
                self._intake.fail(live, token, result)
        self._advance(conclusion, result)
        now = time.monotonic()
        for (live, _), token in zip(pairs, chosen, strict=True):
            if isinstance(token, Chosen) and live.id in self._roster:
                self._accept(live, token, conclusion.mode, now, result)

    def _advance(self, conclusion: Conclusion, result: StepResult) -> None:
        """What was computed is good, now that nobody's logits have said otherwise."""
        for sequence, count in conclusion.advanced:
            if self._roster.has(sequence):
                self._intake.settled(self._roster.of(sequence), result)
                self.scheduler.advanced(sequence, count)

    def _accept(self, live: Live, chosen: Chosen, mode: StepMode, now: float, result: StepResult) -> None:
        params, sequence, token = live.request.sampling, live.sequence, chosen.token
        result.generated += 1
        live.merged += mode == "merged"
        first = live.times.last_token is None
        if live.times.last_token is None:
            live.times.first_token = now
        else:
            result.gaps.append(now - live.times.last_token)
        live.times.last_token = now
        sequence.tokens.append(token)
        try:
            live.sampling.record(token)
            enough = sequence.generated >= params.min_tokens
            complete = live.sampling.complete
            ended = (enough or complete) and token in live.sampling.ends
            told = params.include_stop or not ended
            text = live.text.push(token, may_stop=enough and not ended) if told else ""
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self._intake.fail(live, error, result)
            return
        logprobs = (chosen.logprobs,) if chosen.logprobs is not None else ()
        routing = live.outcome if first else None
        result.events.append((live.id, TextDelta(text, (token,), logprobs, routing)))
        if ended:
            self._finish(live, "stop", token if token in params.stop_token_ids else None, result)
        elif live.text.stopped_by is not None:
            self._finish(live, "stop", live.text.stopped_by, result)
        elif complete:
            self._finish(live, "stop", None, result)
        elif sequence.generated >= params.max_tokens:
            self._finish(live, "length", None, result)

    def _prompt(self, rows: PromptRows, logits: Tensor, result: StepResult) -> None:
        if not self._roster.has(rows.sequence):
            return
        live = self._roster.of(rows.sequence)
        count = live.request.sampling.prompt_logprobs or 0
        targets = rows.sequence.tokens[rows.first : rows.first + rows.end - rows.begin]
        try:
            found = prompt_logprobs(logits[rows.begin : rows.end], targets, count)
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self._intake.fail(live, error, result)
            return
        live.prompt = [*live.prompt[: rows.first - 1], *found]

    def _pool(self, rows: PooledRows, conclusion: Conclusion, result: StepResult) -> Live | None:
        """Add states to a request's pool; the request, if that was all of its prompt."""
        if not self._roster.has(rows.sequence) or conclusion.states is None:
            return None
        live = self._roster.of(rows.sequence)
        made = rows.count if conclusion.mode == "merged" else 0
        # A preempted prompt begins again.
        live.merged = live.merged + made if rows.sequence.computed else made
        try:
            if live.pool is not None and rows.begin < rows.end:
                live.pool.put(rows.first, conclusion.states[rows.begin : rows.end])
        except Exception as error:  # noqa: BLE001 a fault in one request must not reach the others
            self._intake.fail(live, error, result)
            return None
        return live if rows.whole else None

    def _finish(self, live: Live, reason: FinishReason, stop: str | int | None, result: StepResult) -> None:
        self._roster.finish(live, reason, stop, result)
        self._intake.ended(live, result)

    def _forget(self, key: ExpertKey) -> None:
        """Nobody needs a generation any more: give back everything that was made of it."""
        self.residency.forget(key)
        self.scheduler.forget(key)
        if self.merged is not None:
            self.merged.forget(key)

    def _stats(self, step: Step, conclusion: Conclusion, result: StepResult, seconds: float) -> StepStats:
        return StepStats(
            mode=conclusion.mode,
            seconds=seconds,
            decode_rows=len(step.plan.decode),
            prefill_tokens=sum(chunk.count for chunk in step.plan.prefill),
            generated_tokens=result.generated,
            active_experts=conclusion.active_experts,
            patterns=conclusion.patterns,
            rebuilt=conclusion.rebuilt,
            preemptions=len(step.plan.preempted),
            inter_token_seconds=tuple(result.gaps),
            routes=self.dispatcher.taken(),
            routed_requests=sum(isinstance(item, Live) for item in step.routed),
            route_seconds=seconds if step.routed else 0.0,
        )
