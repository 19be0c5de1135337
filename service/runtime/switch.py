"""The runtime that the rest of the server holds: one bundle after another behind the same face.

A swap opens the new bundle's runtime beside the running one, gives it all new requests from one moment on, and lets
the old one end what it has begun. Knows no bundle and no catalogue: whoever asks for a swap brings the opening.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from experts.bundle import ExpertWeights
from service.core import (
    Constraint,
    EngineGauges,
    ExpertKey,
    ExpertStatus,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
)
from service.engine.change import LiveChange
from service.errors import ConflictError, ExpertRejectedError, ShuttingDownError, StorageFullError
from service.feedback import Feedback
from service.grammar import Grammar
from service.runtime.generation import Generation
from service.runtime.memory import available_bytes
from service.runtime.runtime import Runtime

_log = logging.getLogger(__name__)

_TOTALS = (
    "prefix_queries",
    "prefix_hits",
    "expert_loads",
    "expert_evictions",
    "expert_hits",
    "expert_misses",
)
"""Of the gauges, what only grows."""

_PRESENT = (
    "running",
    "waiting",
    "kv_blocks_used",
    "kv_blocks_cached",
    "kv_blocks_total",
    "experts_resident",
    "merged_bytes",
)
"""Of the gauges, what two runtimes have together."""


class RuntimeSwitch:
    """The current runtime, and at most one before it that still answers. Methods are for the event loop.

    Args:
        first: what serves until the first swap; the switch closes it.
        available: bytes of memory that can be had for another runtime; None where nobody knows.
    """

    def __init__(self, first: Runtime, available: Callable[[], int | None] | None = None) -> None:
        self._current = first
        self._available = available or (lambda: available_bytes(first.device))
        self._leaving: Runtime | None = None
        self._leaving_nbytes = 0
        self._farewell: asyncio.Task[None] | None = None
        self._swapping = asyncio.Lock()
        self._closed = False
        self._feedback: Feedback | None = None
        self._past = dict.fromkeys(_TOTALS, 0)

    # -- one bundle after another -------------------------------------------------------------------

    async def swap(
        self,
        open_new: Callable[[], Runtime],
        *,
        nbytes: int | None = None,
        before: Callable[[Runtime], Awaitable[None]] | None = None,
    ) -> None:
        """Serve by another runtime from one moment on; no request is lost, and none waits for it.

        Returns when new requests go to the new one; the old one ends what it has begun, and is closed then. If it
        raises, the old one serves on. Whoever changes experts must not do so meanwhile: a change belongs to a bundle.

        Args:
            open_new: `open_runtime` of the other bundle; called on a thread.
            nbytes: that the new runtime takes; about as many as the current one where it is not given.
            before: awaited with the new runtime before it gets its first request.

        Raises:
            StorageFullError: there is not enough memory for two.
            ExpertRejectedError: the other bundle has another tokenizer, vocabulary or context, so that it was not
                built over the same base.
            ShuttingDownError: the server ends.
        """
        async with self._swapping:
            if self._farewell is not None:
                # Never three: the one before the current has to be gone first.
                await asyncio.shield(self._farewell)
            own = self._current.nbytes
            self._check_memory(own if nbytes is None else nbytes)
            opening = asyncio.create_task(asyncio.to_thread(_opened, open_new, self._current.threads))
            try:
                new = await asyncio.shield(opening)
            except asyncio.CancelledError:
                # A thread cannot be stopped; nobody will want what it makes.
                opening.add_done_callback(_discard)
                raise
            try:
                _check_alike(self._current, new)
                if before is not None:
                    await before(new)
                if self._closed:
                    raise ShuttingDownError("the server is shutting down", retry_after=1.0)
            except BaseException:
                await asyncio.to_thread(new.close)
                raise
            old, self._current = self._current, new
            if self._feedback is not None:
                old.leave_feedback()
                self._feedback.begin_anew(new.router)
                new.use_feedback(self._feedback)
            # Asked for now: a runtime that is closed cannot tell any more.
            self._leaving, self._leaving_nbytes = old, own
            self._farewell = asyncio.create_task(self._see_off(old), name="twinserve-farewell")
            _log.info("a new runtime serves %s; the old one ends what it has begun", new.bundle_name)

    @property
    def settled(self) -> bool:
        """No runtime is on its way out."""
        return self._leaving is None

    async def left(self) -> None:
        """Wait until the runtime before the current one is gone, if there is one."""
        if self._farewell is not None:
            await asyncio.shield(self._farewell)

    async def _see_off(self, old: Runtime) -> None:
        """Let a runtime end what it has begun, close it and give its memory back."""
        try:
            await old.drain(math.inf)
            await asyncio.to_thread(old.close)
        finally:
            last = old.gauges()
            for name in _TOTALS:
                self._past[name] += getattr(last, name)
            self._leaving, self._leaving_nbytes = None, 0
            try:
                await asyncio.to_thread(_give_memory_back)
            finally:
                # The next swap waits for it: it counts what memory there is.
                self._farewell = None
        _log.info("the old runtime is closed")

    def check_room(self) -> None:
        """Whether there is memory for another bundle of about the current one's size, once a swap opens it.

        Raises:
            StorageFullError: there is not, so that a swap would fail.
        """
        # A swap waits until the runtime that is on its way out has given its memory back.
        self._check_memory(self._current.nbytes, self._leaving_nbytes)

    def _check_memory(self, nbytes: int, coming: int = 0) -> None:
        """Raise StorageFullError unless there are as many bytes, with those that are about to be freed."""
        left = self._available()
        if left is None:
            return
        left += coming
        if nbytes > left:
            raise StorageFullError(
                f"two bundles cannot be served at once: the new one needs about {nbytes >> 20} MiB of memory beside "
                f"the old one, and {left >> 20} MiB are left; give the server more, lower TWINSERVE_KV_CACHE_BYTES, "
                "or restart it with the new bundle"
            )

    # -- what it serves -----------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """The one that gets new requests."""
        return self._current

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The shared folder's tokenizer, with its chat template."""
        return self._current.tokenizer

    @property
    def bundle_name(self) -> str:
        """The model name that asks the router."""
        return self._current.bundle_name

    @property
    def vocab_size(self) -> int:
        """Prompt token ids are below it."""
        return self._current.vocab_size

    @property
    def state_size(self) -> int:
        """Values of a pooled state."""
        return self._current.state_size

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._current.max_context

    @property
    def max_batch(self) -> int:
        """Sequences that run at once."""
        return self._current.max_batch

    @property
    def alive(self) -> bool:
        """The current engine thread runs and has not failed."""
        return self._current.alive

    @property
    def failure(self) -> str | None:
        """Why the current engine has ended; None while it runs."""
        return self._current.failure

    @property
    def ready(self) -> bool:
        """New requests are accepted."""
        return self._current.ready

    # -- requests: see `Runtime` --------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Generation:
        """Accept a request and return its events. Raises as `Runtime.submit`."""
        leaving = self._leaving
        if leaving is not None and leaving.running(request.id):
            raise ConflictError(
                f"a request of id {request.id!r} is running; wait for its end, or send another request_id or "
                "X-Request-Id",
                param="request_id",
            )
        return self._current.submit(request)

    async def compile(self, constraint: Constraint) -> Grammar:
        """What a request with this constraint needs. Raises as `Runtime.compile`."""
        return await self._current.compile(constraint)

    async def route(self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice) -> list[RoutingOutcome]:
        """What the router would choose for each prompt. Raises as `Runtime.route`."""
        return await self._current.route(prompts, choice)

    async def features(self, prompts: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
        """Router features of each prompt, (prompts, d). Raises as `Runtime.features`."""
        return await self._current.features(prompts)

    # -- experts: see `Runtime` ---------------------------------------------------------------------

    def router_names(self) -> tuple[str, ...]:
        """The bundle's routers, by kind."""
        return self._current.router_names()

    def expert_names(self) -> frozenset[str]:
        """Every expert that can be named."""
        return self._current.expert_names()

    def experts(self) -> list[ExpertStatus]:
        """The current runtime's, and what requests of the one before it still use."""
        found = self._current.experts()
        leaving = self._leaving
        if leaving is None:
            return found
        known = {(status.name, status.generation) for status in found}
        used = [
            replace(status, state="retired", routed=False)
            for status in leaving.experts()
            if status.leases and (status.name, status.generation) not in known
        ]
        return sorted([*found, *used], key=lambda status: (status.name, -status.generation))

    async def apply(self, change: LiveChange) -> None:
        """Switch experts, router and trials together. Raises as `Runtime.apply`."""
        await self._current.apply(change)

    async def stage(self, expert: ExpertWeights) -> None:
        """Have a generation in memory for requests that name it. Raises as `Runtime.stage`."""
        await self._current.stage(expert)

    async def unstage(self, key: ExpertKey) -> None:
        """Keep it no more for that. Raises as `Runtime.unstage`."""
        await self._current.unstage(key)

    def use_feedback(self, feedback: Feedback) -> None:
        """Let it adjust the router; what it has learnt is forgotten at a swap, since other states are read then."""
        self._feedback = feedback
        self._current.use_feedback(feedback)

    # -- state --------------------------------------------------------------------------------------

    def gauges(self) -> EngineGauges:
        """A snapshot of all that runs; totals go on over swaps. Any thread."""
        now, leaving = self._current.gauges(), self._leaving
        parts = {field.name: getattr(now, field.name) for field in fields(now)}
        for name in _TOTALS:
            parts[name] += self._past[name]
        if leaving is not None:
            old = leaving.gauges()
            for name in (*_TOTALS, *_PRESENT):
                parts[name] += getattr(old, name)
        return EngineGauges(**parts)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let running ones finish up to `timeout` seconds, then end them with an error."""
        self._closed = True
        leaving = self._leaving
        async with asyncio.TaskGroup() as group:
            group.create_task(self._current.drain(timeout))
            if leaving is not None:
                group.create_task(leaving.drain(timeout))

    def close(self) -> None:
        """End the engine threads; live requests get an error. Blocks until they have ended."""
        self._closed = True
        for runtime in (self._leaving, self._current):
            if runtime is not None:
                runtime.close()


def _opened(open_new: Callable[[], Runtime], threads: int | None) -> Runtime:
    """On a thread, which has as many torch threads as the one had that opened the first runtime."""
    if threads is not None:
        torch.set_num_threads(threads)
    return open_new()


def _discard(opening: asyncio.Task[Runtime]) -> None:
    """Close a runtime that came too late."""
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=opening.result().close, name="twinserve-discard").start()


def _check_alike(old: Runtime, new: Runtime) -> None:
    """Raise ExpertRejectedError unless clients cannot tell the two by their tokens."""
    for name, before, after in (
        ("vocabulary", old.vocab_size, new.vocab_size),
        ("width", old.state_size, new.state_size),
        ("context", old.max_context, new.max_context),
        ("tokenizer", _tokens(old), _tokens(new)),
        ("chat template", old.tokenizer.chat_template, new.tokenizer.chat_template),
    ):
        if before != after:
            told = "" if name in ("tokenizer", "chat template") else f" ({before}, and {after})"
            raise ExpertRejectedError(
                f"the new bundle's {name} is another than the served one's{told}, so it was not built over the same "
                "base; restart the server to serve it",
                param="path",
            )


def _tokens(runtime: Runtime) -> str:
    """All that a tokenizer does, as text."""
    return str(runtime.tokenizer.backend_tokenizer.to_str())


def _give_memory_back() -> None:
    """What Python and the C library keep of freed memory goes back to the system, where they can be told to."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
