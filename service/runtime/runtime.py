"""What the api talks to: admission, results, experts, state. Its methods are for the event loop."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experts.bundle import ExpertWeights
from experts.routing import Router
from service.core import (
    Constraint,
    EngineGauges,
    Event,
    ExpertKey,
    ExpertStatus,
    Failed,
    Finished,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
)
from service.engine.background import background_thread
from service.engine.change import LiveChange, key_of, prepare
from service.engine.engine import Engine
from service.engine.live import Question
from service.engine.roster import StepResult
from service.errors import (
    ConflictError,
    ContextLengthError,
    EngineDeadError,
    ExpertRejectedError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    TwinserveError,
)
from service.feedback import Feedback
from service.grammar import Grammar, Grammars
from service.runtime.config import RuntimeConfig
from service.runtime.generation import Generation
from service.runtime.thread import Command, EngineThread, StatsSink

T = TypeVar("T")

_PROFILED_AT_ONCE = 16
"""Prompts of a registration that wait for the router together, so that it never fills the queue."""


class Runtime:
    """A served bundle. Made by `open_runtime`; methods are for the event loop unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        bundle_name: str,
        config: RuntimeConfig,
        stats: StatsSink | None,
        beside: Sequence[Executor],
    ) -> None:
        self.tokenizer = tokenizer
        self.bundle_name = bundle_name
        self.vocab_size = engine.model.vocabulary
        self.state_size = engine.model.width
        self.max_context = engine.model.options.max_tokens
        self.max_batch = config.engine.limits.max_running
        self.threads = config.threads
        self._device = engine.model.device
        self._served: Engine | None = engine
        self._last: EngineGauges | None = None
        self._beside = beside
        self._limit = self.max_batch + config.max_queue
        self._backlog = config.backlog
        self._generations: dict[str, Generation] = {}
        self._asked = 0
        self._draining = False
        self._changing = asyncio.Lock()
        self._preparing = background_thread("twinserve-preparing")
        self._feedback: Feedback | None = None
        self._grammars = Grammars(tokenizer, self.vocab_size, sorted(engine.end_ids), config.grammars)
        self._grammars.prepare()
        self._thread = EngineThread(engine, self._deliver, self._end_all, stats, config.threads)
        engine.residency.loader.on_loaded = self._thread.nudge
        self._thread.start()

    # -- requests -----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Generation:
        """Accept a request and return its events.

        Raises:
            EngineDeadError, ShuttingDownError, QueueFullError: nothing can be taken now.
            ContextLengthError, InvalidRequestError: the prompt does not fit the model.
            ConflictError: a request of that id is running.
            UnknownExpertError: a gate names an expert that is not registered.
        """
        self._check_open()
        self._check_prompt(request)
        if len(self._generations) >= self._limit:
            raise QueueFullError(
                f"{len(self._generations)} requests are running or waiting, the limit is {self._limit} "
                "(TWINSERVE_MAX_QUEUE); try again later",
                retry_after=1.0,
            )
        if request.id in self._generations:
            raise ConflictError(
                f"a request of id {request.id!r} is running; wait for its end, or send another request_id or "
                "X-Request-Id",
                param="request_id",
            )
        engine, arrived = self._engine, time.monotonic()
        if request.routing.gates is None:
            self._check_router()
        fixed = engine.dispatcher.fixed(request.routing) if request.routing.gates is not None else None
        generation = Generation(
            asyncio.get_running_loop(), lambda: self._cancel(request.id), request.client, self._backlog
        )
        self._generations[request.id] = generation
        try:
            self._thread.send(lambda result: engine.add(request, fixed, arrived, result))
        except EngineDeadError:
            del self._generations[request.id]
            raise
        return generation

    async def compile(self, constraint: Constraint) -> Grammar:
        """What a request with this constraint needs; remembered, off the event loop and the engine's thread.

        Raises:
            InvalidRequestError: it cannot be compiled; names the field.
            LimitExceededError: it is beyond a bound.
            QueueFullError, ShuttingDownError: nothing can be compiled now.
        """
        return await self._grammars.get(constraint)

    async def route(self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice) -> list[RoutingOutcome]:
        """What the router would choose for each prompt, without generating.

        Raises:
            InvalidRequestError: there is no router.
            EngineDeadError, ShuttingDownError: nothing can be taken now.
        """
        dispatcher = self._engine.dispatcher
        if choice.gates is not None:
            pattern, named = dispatcher.fixed(choice)
            self._thread.send(lambda _: self._engine.release(pattern))
            return [named] * len(prompts)
        self._check_router()

        def answer(features: Tensor) -> RoutingOutcome:
            pattern, found = dispatcher.route(features, choice, explore=False)
            self._engine.release(pattern)
            return found

        if self._asked + len(prompts) > self._limit:
            raise QueueFullError(
                f"{self._asked} prompts wait to be routed, the limit is {self._limit} "
                "(TWINSERVE_MAX_QUEUE); try again later, or with fewer",
                retry_after=1.0,
            )
        return await self._ask(prompts, answer)

    async def features(self, prompts: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
        """Router features of each prompt, (prompts, d) float32.

        Raises:
            InvalidRequestError: there is no router that says which features.
        """
        if self._engine.spec is None:
            raise InvalidRequestError(
                "this bundle has no router, so prompts have no features", param="prompts"
            )
        rows: list[Tensor] = []
        for begin in range(0, len(prompts), _PROFILED_AT_ONCE):
            rows += await self._ask(prompts[begin : begin + _PROFILED_AT_ONCE], lambda features: features)
        return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)

    # -- experts ------------------------------------------------------------------------------------

    def router_names(self) -> tuple[str, ...]:
        """The bundle's routers, by kind; there is one, or none."""
        router = self._engine.dispatcher.router
        return () if router is None else (router.kind,)

    def expert_names(self) -> frozenset[str]:
        """Every expert that can be named; cheap, for every request."""
        return frozenset(self._engine.dispatcher.catalogue.current())

    def experts(self) -> list[ExpertStatus]:
        """Every generation that is current, tried out, staged or still used; by name, newest first."""
        dispatcher, residency = self._engine.dispatcher, self._engine.residency
        bank = self._engine.model.bank
        held = dispatcher.catalogue.held()
        routed = set(dispatcher.router.names) if dispatcher.router is not None else set[str]()
        found = []
        for key, leases in dispatcher.catalogue.leases().items():
            resident = bank.resident(key)
            found.append(
                ExpertStatus(
                    name=key.name,
                    generation=key.generation,
                    state=held.get(key, "retired"),
                    routed=held.get(key) == "active" and key.name in routed,
                    leases=leases,
                    nbytes=resident.nbytes if resident else residency.pool.size(key),
                    resident=resident is not None,
                    max_rank=resident.max_rank if resident else 0,
                )
            )
        return sorted(found, key=lambda status: (status.name, -status.generation))

    async def apply(self, change: LiveChange) -> None:
        """Switch experts, router and trials together, between two steps; requests keep what they have.

        If it raises, nothing has changed.

        Raises:
            ExpertRejectedError: an expert does not fit the model, or the router reads what the model does not give.
            EngineDeadError: the runtime has ended.
            ValueError: a generation is neither given nor in memory, or the trials' shares exceed 100 %.
        """
        async with self._changing:
            engine = self._engine
            self._check_spec(change.router, *(trial.router for trial in change.trials))
            held, lazy = engine.dispatcher.catalogue.held(), engine.residency.pool.limited
            prepared = await self._prepare(lambda: prepare(change, engine.model.bank, held, lazy=lazy))
            await self._call(lambda _: engine.apply(prepared))
            self._known_to_feedback()

    async def stage(self, expert: ExpertWeights) -> None:
        """Have a generation in memory for requests that name it, by `RoutingChoice.generations`; nobody else gets it.

        Raises:
            ExpertRejectedError: it does not fit the model; nothing has changed then.
            EngineDeadError: the runtime has ended.
        """
        async with self._changing:
            engine, key = self._engine, key_of(expert)
            if key in engine.dispatcher.catalogue.held():
                # Its factors are here; now it stays whatever becomes of its trial.
                await self._call(lambda _: engine.dispatcher.catalogue.stage(key))
                return
            resident = await self._prepare(lambda: engine.model.bank.prepare(expert))
            await self._call(lambda _: engine.stage(resident, expert))

    async def unstage(self, key: ExpertKey) -> None:
        """Keep a generation no more for being staged; one that is published meanwhile, or used, stays.

        Raises:
            EngineDeadError: the runtime has ended.
        """
        async with self._changing:
            engine = self._engine
            await self._call(lambda _: engine.unstage(key))

    def use_feedback(self, feedback: Feedback) -> None:
        """Let it adjust the router from now on; it is told of routed answers and of experts that come and go."""
        self._feedback = feedback
        self._engine.dispatcher.adjuster = feedback
        self._known_to_feedback()

    def leave_feedback(self) -> None:
        """It adjusts another runtime from now on; what this one still answers cannot be rated."""
        self._feedback = None
        if self._served is not None:
            self._served.dispatcher.adjuster = None

    def _known_to_feedback(self) -> None:
        router = self._engine.dispatcher.router
        if self._feedback is not None:
            self._feedback.retain(router.names if router is not None else ())

    # -- state --------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """The engine thread runs and has not failed."""
        return self._thread.alive

    @property
    def failure(self) -> str | None:
        """Why the engine has ended; None while it runs."""
        return self._thread.failure

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    @property
    def nbytes(self) -> int:
        """About what all of it takes: weights, twice where packed copies are used, KV cache, experts."""
        model, merged = self._engine.model, self._engine.merged
        weights = sum(parameter.nbytes for parameter in model.model.parameters())
        copies = 2 if model.native is not None or model.bank.packed else 1
        experts = self._engine.residency.pool.used_bytes
        return copies * weights + model.cache.nbytes + experts + (merged.stats.nbytes if merged else 0)

    @property
    def router(self) -> Router | None:
        """The current one."""
        return self._engine.dispatcher.router

    def running(self, request_id: str) -> bool:
        """A request of that id has not ended."""
        return request_id in self._generations

    @property
    def ready(self) -> bool:
        """New requests are accepted."""
        return self.alive and not self._draining

    def gauges(self) -> EngineGauges:
        """A snapshot for metrics; any thread. After `close` the last one."""
        served, last = self._served, self._last
        if served is None and last is not None:
            return last
        return self._engine.gauges(alive=self.alive)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let running ones finish up to `timeout` seconds, then end them with an error."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while (self._generations or self._asked) and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._generations and self.alive:
            error = ShuttingDownError("the server stopped before the answer was complete", retry_after=1.0)
            await self._call(lambda result: self._engine.fail_all(error, result))

    def close(self) -> None:
        """End the engine thread; live requests get an error. Blocks until it has ended.

        Weights and KV cache go with it, whoever still holds the runtime: an app's routes do for as long as it lives.
        """
        self._draining = True
        self._thread.close()
        if self._feedback is not None:
            self._feedback.close()
        self._grammars.close()
        for executor in (*self._beside, self._preparing):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._served is not None:
            self._last = self._served.gauges(alive=False)
            self._served = None

    @property
    def _engine(self) -> Engine:
        """The engine.

        Raises:
            EngineDeadError: the runtime is closed.
        """
        served = self._served
        if served is None:
            raise self._thread.dead()
        return served

    async def _prepare(self, make: Callable[[], T]) -> T:
        """Have something made on the thread that gives way to the engine's."""
        return await asyncio.wrap_future(self._preparing.submit(make))

    def _check_spec(self, *routers: Router | None) -> None:
        """Raise ExpertRejectedError for a router that reads other states than this runtime's model gives."""
        spec = self._engine.spec
        for router in routers:
            if router is not None and router.spec != spec:
                raise ExpertRejectedError(
                    "the router reads other states of the model than the one that this runtime was opened with; "
                    "serve it by a new bundle"
                )

    # -- event loop side ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self.alive:
            raise self._thread.dead()
        if self._draining:
            raise ShuttingDownError("the server is shutting down", retry_after=1.0)

    def _check_router(self) -> None:
        if self._engine.dispatcher.router is None:
            raise InvalidRequestError(
                "this bundle has no router; name an expert as model, or give gates", param="model"
            )

    def _check_prompt(self, request: GenerationRequest) -> None:
        ids = request.prompt_ids
        if not ids:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidRequestError(
                f"token ids must lie in [0, {self.vocab_size}); got {min(ids)}..{max(ids)}", param="prompt"
            )
        wanted = len(ids) + request.sampling.max_tokens
        if wanted > self.max_context:
            raise ContextLengthError(
                f"{len(ids)} prompt tokens and max_tokens={request.sampling.max_tokens} need {wanted}; "
                f"the context is {self.max_context}: shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if not self._engine.scheduler.fits(wanted):
            raise ContextLengthError(
                f"{len(ids)} prompt tokens and max_tokens={request.sampling.max_tokens} need more than the whole "
                "KV cache (TWINSERVE_KV_CACHE_BYTES): shorten the prompt or lower max_tokens",
                param="max_tokens",
            )

    async def _ask(self, prompts: Sequence[tuple[int, ...]], answer: Callable[[Tensor], T]) -> list[T]:
        self._check_open()
        self._asked += len(prompts)
        try:
            futures = [self._question(ids, answer) for ids in prompts]
            return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in futures)))
        finally:
            self._asked -= len(prompts)

    def _question(self, ids: tuple[int, ...], answer: Callable[[Tensor], T]) -> "Future[T]":
        future: Future[T] = Future()

        def settle(features: Tensor | Exception) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if isinstance(features, Exception):
                    raise features
                future.set_result(answer(features))
            except Exception as error:  # noqa: BLE001 belongs to whoever asked
                future.set_exception(error)

        self._thread.send(lambda _: self._engine.ask(Question(ids, settle, future.cancelled)))
        return future

    async def _call(self, change: Command) -> None:
        """Run `change` on the engine thread between two steps.

        Whoever is cancelled meanwhile leaves when it is done, or will not be: nothing goes on behind his back.
        """
        future: Future[None] = Future()

        def command(result: StepResult) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                change(result)
                future.set_result(None)
            except Exception as error:  # noqa: BLE001 belongs to the caller
                future.set_exception(error)

        self._thread.send(command)
        waiter = asyncio.wrap_future(future)
        try:
            await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([waiter])
            raise

    def _cancel(self, request_id: str) -> None:
        # When the engine has ended, so has the request.
        with contextlib.suppress(EngineDeadError):
            self._thread.send(lambda result: self._engine.cancel(request_id, result))

    def _rateable(self, request_id: str, client: str, event: Event) -> None:
        if self._feedback is None or not isinstance(event, Finished) or event.pooled is not None:
            return
        if event.routing is not None:
            self._feedback.routed(request_id, client, event.routing)

    def _end_all(self, error: TwinserveError) -> None:
        """On the engine thread, last of all: whoever is still without a terminal event gets the error."""
        self._deliver([(request_id, Failed(error)) for request_id in list(self._generations)])

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        """On the engine thread: send events to the loops of their requests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[str, Event]]] = {}
        for request_id, event in events:
            generation = self._generations.get(request_id)
            if generation is not None:
                by_loop.setdefault(generation.loop, []).append((request_id, event))
        for loop, batch in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._dispatch, batch)

    def _dispatch(self, events: Iterable[tuple[str, Event]]) -> None:
        for request_id, event in events:
            generation = self._generations.get(request_id)
            if generation is None:
                continue
            if isinstance(event, Finished | Failed):
                del self._generations[request_id]
                self._rateable(request_id, generation.client, event)
            generation.deliver(event)
