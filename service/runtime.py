"""Between event loop and engine: admission, the engine thread, cancellation, results back to the loop.

Requests are accepted on an event loop; one thread owns the engine and runs its steps; tokens cross back
batched, once a step. A request ends with exactly one terminal event, whatever happens to it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from experts.bundle import Bundle, ExpertWeights
from experts.routing import Router
from service.core import (
    EngineGauges,
    Event,
    ExpertStatus,
    Failed,
    Finished,
    GenerationRequest,
    RequestStats,
    RoutingChoice,
    RoutingOutcome,
    StepStats,
)
from service.engine.engine import Engine, StepResult
from service.engine.live import Question
from service.engine.model import SharedModel
from service.engine.routing import Dispatcher, RoutingDefaults
from service.errors import (
    ContextLengthError,
    EngineDeadError,
    ExpertNotFoundError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    TwinserveError,
)
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Budget, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Frozen values that the settings give.

    Attributes:
        max_batch: KV rows, the most requests that generate at once.
        max_queue: requests that may wait beyond those.
        max_context: most tokens of prompt and answer; None takes the model's own limit, at most 4096.
        device: torch device, or "auto" for CUDA where there is one.
        dtype: torch dtype name, or "auto" for bfloat16.
        threads: intra-op threads of the engine; None leaves torch's choice.
        prefill_step_tokens, prefill_chunk_tokens: see `Budget`.
        pack_base: reorder base weights for the processor where that gains.
    """

    max_batch: int = 32
    max_queue: int = 256
    max_context: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    prefill_step_tokens: int = 1024
    prefill_chunk_tokens: int = 256
    router_top_k: int | None = None
    router_threshold: float | None = None
    pack_base: bool = True


class StatsSink(Protocol):
    """Who is told what happened; called on the engine thread."""

    def on_step(self, stats: StepStats) -> None:
        """After every step."""

    def on_request(self, stats: RequestStats) -> None:
        """After every ended request."""


class Generation(AsyncIterator[Event]):
    """The events of one request: text as it comes, then one `Finished` or `Failed`, then the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None]) -> None:
        self.loop = loop
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._arrival = asyncio.Event()
        self._over = False

    def cancel(self) -> None:
        """Stop generating soon; the terminal event still comes. Harmless when repeated or too late."""
        self._cancel()

    def deliver(self, event: Event) -> None:
        """On the event loop: hand over one event."""
        self._events.append(event)
        self._arrival.set()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        while not self._events:
            self._arrival.clear()
            await self._arrival.wait()
        event = self._events.popleft()
        self._over = isinstance(event, Finished | Failed)
        return event


T = TypeVar("T")
Command = Callable[[StepResult], None]


class Runtime:
    """A served bundle. Made by `open`; methods are for the event loop unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        bundle_name: str,
        end_ids: frozenset[int],
        config: RuntimeConfig,
        stats: StatsSink | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bundle_name = bundle_name
        self.end_ids = end_ids
        self.vocab_size = engine.model.vocabulary
        self.max_context = engine.model.cache.max_tokens
        self.max_batch = config.max_batch
        self.failure: str | None = None
        self._engine = engine
        self._config = config
        self._stats = stats
        self._wake = threading.Condition()
        self._inbox: deque[Command] = deque()
        self._generations: dict[str, Generation] = {}
        self._draining = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="twinserve-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, bundle: Bundle, config: RuntimeConfig, stats: StatsSink | None = None) -> "Runtime":
        """Load a bundle's shared expert, experts and router, and start the engine thread. Blocks.

        Raises:
            ExpertRejectedError: the shared model or an expert cannot be served exactly.
            BundleError: a file of the bundle is broken.
        """
        device = torch.device(_device(config.device))
        dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        router = bundle.router()
        tokenizer = AutoTokenizer.from_pretrained(
            bundle.shared_path, local_files_only=True, trust_remote_code=False
        )
        model = SharedModel(
            bundle.shared_path,
            rows=config.max_batch,
            max_tokens=_context(bundle, config.max_context),
            dtype=dtype,
            device=device,
            spec=router.spec if router is not None else None,
            pack_base=config.pack_base,
        )
        catalogue = Catalogue()
        for name in bundle.expert_names():
            resident = model.bank.prepare(bundle.expert(name))
            model.bank.add(resident)
            catalogue.publish(resident.key)
        end_ids = _end_ids(model, tokenizer)
        engine = Engine(
            model,
            Scheduler(config.max_batch, Budget(config.prefill_step_tokens, config.prefill_chunk_tokens)),
            Dispatcher(catalogue, router, RoutingDefaults(config.router_top_k, config.router_threshold)),
            tokenizer.backend_tokenizer,
            end_ids,
        )
        return cls(engine, tokenizer, bundle.manifest.name, end_ids, config, stats)

    # -- requests -----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Generation:
        """Accept a request and return its events.

        Raises:
            EngineDeadError, ShuttingDownError, QueueFullError: nothing can be taken now.
            ContextLengthError, InvalidRequestError: the prompt does not fit the model.
            UnknownExpertError: a gate names an expert that is not registered.
        """
        self._check_open()
        self._check_prompt(request)
        limit = self._config.max_batch + self._config.max_queue
        if len(self._generations) >= limit:
            raise QueueFullError(
                f"{len(self._generations)} requests are running or waiting, the limit is {limit} "
                "(TWINSERVE_MAX_QUEUE); try again later",
                retry_after=1.0,
            )
        if request.id in self._generations:
            raise InvalidRequestError(f"a request with id {request.id!r} is running", param="request_id")
        engine, arrived = self._engine, time.monotonic()
        fixed = engine.dispatcher.fixed(request.routing) if request.routing.gates is not None else None
        generation = Generation(asyncio.get_running_loop(), lambda: self._cancel(request.id))
        self._generations[request.id] = generation
        self._send(lambda result: engine.add(request, fixed, arrived, result))
        return generation

    async def route(self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice) -> list[RoutingOutcome]:
        """What the router would choose for each prompt, without generating.

        Raises:
            InvalidRequestError: there is no router.
            EngineDeadError, ShuttingDownError: nothing can be taken now.
        """
        dispatcher = self._engine.dispatcher
        if choice.gates is not None:
            pattern, named = dispatcher.fixed(choice)
            self._send(lambda _: self._engine.release(pattern))
            return [named] * len(prompts)
        if dispatcher.router is None:
            raise InvalidRequestError(
                "this bundle has no router; name an expert as model, or give gates", param="model"
            )

        def answer(features: Tensor) -> RoutingOutcome:
            pattern, found = dispatcher.route(features, choice)
            self._engine.release(pattern)
            return found

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
        rows = await self._ask(prompts, lambda features: features)
        return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)

    # -- experts ------------------------------------------------------------------------------------

    def experts(self) -> list[ExpertStatus]:
        """Every current expert, and older generations that requests still use; by name, newest first."""
        dispatcher, bank = self._engine.dispatcher, self._engine.model.bank
        current = set(dispatcher.catalogue.current().values())
        routed = set(dispatcher.router.names) if dispatcher.router is not None else set[str]()
        found = []
        for key, leases in dispatcher.catalogue.leases().items():
            resident = bank.resident(key)
            found.append(
                ExpertStatus(
                    name=key.name,
                    generation=key.generation,
                    state="active" if key in current else "retired",
                    routed=key in current and key.name in routed,
                    leases=leases,
                    nbytes=resident.nbytes if resident else 0,
                    max_rank=resident.max_rank if resident else 0,
                )
            )
        return sorted(found, key=lambda status: (status.name, -status.generation))

    async def publish(self, expert: ExpertWeights, router: Router | None) -> None:
        """Put a generation live between two steps, together with the router that knows it.

        Raises:
            ExpertRejectedError: the expert does not fit the model; nothing has changed then.
        """
        resident = await asyncio.to_thread(self._engine.model.bank.prepare, expert)

        def switch() -> None:
            self._engine.publish(resident)
            self._engine.dispatcher.router = router

        await self._call(switch)

    async def retire(self, name: str, router: Router | None) -> None:
        """Stop giving the expert to new requests; running ones keep it.

        Raises:
            ExpertNotFoundError: no such expert.
        """
        if name not in self._engine.dispatcher.catalogue.current():
            raise ExpertNotFoundError(f"no expert named {name!r}", param="name")

        def switch() -> None:
            self._engine.retire(name)
            self._engine.dispatcher.router = router

        await self._call(switch)

    # -- state --------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """The engine thread runs and has not failed."""
        return self.failure is None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """New requests are accepted."""
        return self.alive and not self._draining

    def gauges(self) -> EngineGauges:
        """A snapshot for metrics; any thread."""
        return self._engine.gauges(alive=self.alive)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let running ones finish up to `timeout` seconds, then end them with an error."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._generations and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._generations and self.alive:
            error = ShuttingDownError("the server stopped before the answer was complete", retry_after=1.0)
            await self._call(lambda: self._deliver(self._engine.fail_all(error)))

    def close(self) -> None:
        """End the engine thread; live requests get an error. Blocks until it has ended."""
        self._draining = True
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # -- event loop side ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self.alive:
            raise EngineDeadError(f"the engine has stopped ({self.failure or 'closed'}); restart the server")
        if self._draining:
            raise ShuttingDownError("the server is shutting down", retry_after=1.0)

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

    async def _ask(self, prompts: Sequence[tuple[int, ...]], answer: Callable[[Tensor], T]) -> list[T]:
        self._check_open()
        futures = [self._question(ids, answer) for ids in prompts]
        return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in futures)))

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

        self._send(lambda _: self._engine.ask(Question(ids, settle)))
        return future

    async def _call(self, change: Callable[[], None]) -> None:
        """Run `change` on the engine thread between two steps."""
        self._check_alive()
        future: Future[None] = Future()

        def command(_: StepResult) -> None:
            try:
                change()
                future.set_result(None)
            except Exception as error:  # noqa: BLE001 belongs to the caller
                future.set_exception(error)

        self._send(command)
        await asyncio.wrap_future(future)

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineDeadError(f"the engine has stopped ({self.failure or 'closed'}); restart the server")

    def _cancel(self, request_id: str) -> None:
        self._send(lambda result: self._engine.cancel(request_id, result))

    def _send(self, command: Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _dispatch(self, events: Iterable[tuple[str, Event]]) -> None:
        for request_id, event in events:
            generation = self._generations.get(request_id)
            if generation is None:
                continue
            if isinstance(event, Finished | Failed):
                del self._generations[request_id]
            generation.deliver(event)

    # -- engine thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        error: TwinserveError = ShuttingDownError("the server has stopped", retry_after=1.0)
        try:
            while self._turn():
                pass
        except BaseException as fault:
            logger.exception("the engine has died")
            self.failure = f"{type(fault).__name__}: {fault}"
            error = EngineDeadError(f"the engine has stopped ({self.failure}); restart the server")
        self.failure = self.failure or "closed"
        self._end(error)

    def _turn(self) -> bool:
        """Take commands, run a step, send its events; False when it is time to stop."""
        with self._wake:
            while not (self._inbox or self._closing or self._engine.busy):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            if self._closing:
                return False
        result = StepResult()
        for command in commands:
            command(result)
        self._deliver(result)
        if self._engine.busy:
            self._deliver(self._engine.step())
        return True

    def _end(self, error: TwinserveError) -> None:
        with self._wake:
            commands = list(self._inbox)
            self._inbox.clear()
        result = StepResult()
        for command in commands:
            command(result)
        self._deliver(result)
        self._deliver(self._engine.fail_all(error))

    def _deliver(self, result: StepResult) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[str, Event]]] = {}
        for request_id, event in result.events:
            generation = self._generations.get(request_id)
            if generation is not None:
                by_loop.setdefault(generation.loop, []).append((request_id, event))
        for loop, events in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._dispatch, events)
        if self._stats is not None:
            for ended in result.ended:
                self._stats.on_request(ended)
            if result.stats is not None:
                self._stats.on_step(result.stats)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(bundle: Bundle, limit: int | None) -> int:
    config = AutoConfig.from_pretrained(bundle.shared_path, local_files_only=True).get_text_config()
    own = int(getattr(config, "max_position_embeddings", 4096))
    return min(own, limit if limit is not None else 4096)


def _end_ids(model: SharedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.model.generation_config.eos_token_id if model.model.generation_config else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids if i is not None)
