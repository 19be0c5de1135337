"""A server's registry at work: the tasks that follow, beat and run jobs, begun and ended with the server."""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from experts.errors import ExpertsError
from experts.registry.records import Replica, Snapshot
from service.errors import TwinserveError
from service.registrar.calls import Calls
from service.registrar.caretaker import Caretaker
from service.registrar.family import CatalogueFamily
from service.registrar.follower import Follower
from service.registrar.lasting import lasting
from service.registrar.live import LiveRuntime
from service.registrar.loading import Loading
from service.registrar.opening import Registry
from service.registrar.registrar import Registrar
from service.registrar.replica import Heartbeat
from service.registrar.sink import RegistrySink
from service.registrar.sources import Sources
from service.registrar.work import Supervisor, WorkOptions
from service.settings import Settings

_log = logging.getLogger(__name__)

_WORK = "work"
_EXPIRE_SECONDS = 60.0
_LEAVE_SECONDS = 5.0
"""What the database may take to hear that this replica ends; it finds out by itself otherwise."""

Swap = Callable[[CatalogueFamily], Awaitable[None]]
"""Serve another family instead; returns when new requests get it."""


class RunningRegistry:
    """Everything of one server's registry that runs. `start` and `stop` are for the server's event loop.

    Args:
        settings: limits and times.
        registry: opened.
        live: the runtime that was opened from its family.
        swap: how another bundle comes to be served.
        sink: counts.

    Raises:
        ValueError: a setting cannot be used.
    """

    def __init__(
        self, settings: Settings, registry: Registry, live: LiveRuntime, swap: Swap, sink: RegistrySink
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._live = live
        self._swap_live = swap
        self._sink = sink
        self._calls = Calls()
        self._url = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._beating: list[asyncio.Task[None]] = []
        self.replica = f"{socket.gethostname()[:40]}-{secrets.token_hex(6)}"
        lazy = settings.max_experts is not None or settings.max_expert_bytes is not None
        loading = Loading(registry.family, live, self._calls, sink, lazy=lazy)
        self.follower = Follower(
            registry.catalogue,
            loading,
            self._swap,
            self._calls,
            sink,
            poll_seconds=settings.registry_poll_seconds,
            wait_seconds=settings.expert_wait_seconds,
        )
        # None of these may wait for another: a beat that is late is a death.
        self._beats = Calls(1)
        self._jobs = Calls(4)
        self._cares = Calls(1)
        self._heartbeat = Heartbeat(
            registry.catalogue,
            self.replica,
            self._describe,
            self._beats,
            sink,
            attempts=settings.registration_attempts,
        )
        self._sources = Sources.of(settings, registry.state, registry.blobs, registry.catalogue)
        self.registrar = Registrar(
            registry.catalogue,
            registry.blobs,
            live,
            self.follower,
            self._sources,
            self._calls,
            sink,
            self._wake,
            limit=settings.max_registrations,
            keep_generations=settings.keep_generations,
            replica=self.replica,
            writable=registry.writable,
            fetch=registry.bundle_of,
            problem=lambda: self._supervisor.problem,
        )
        self._caretaker = Caretaker(
            registry.catalogue,
            registry.blobs,
            self._cares,
            sink,
            seconds=settings.collect_seconds,
            keep_generations=settings.keep_generations,
            keep_jobs_days=settings.keep_jobs_days,
            keep_audit_days=settings.keep_audit_days,
        )
        self._supervisor = Supervisor(
            registry.catalogue,
            live,
            lambda: loading.family,
            self._sources,
            WorkOptions.of(settings, registry.state / _WORK, registry.store),
            self.replica,
            calls=self._jobs,
            follow=self.registrar.follow,
            ended=sink.on_job,
        )

    def start(self, url: str) -> None:
        """Begin to follow, and to work if the registry can be written; other replicas are told the URL."""
        self._url = url
        self._begin(self.follower.run(), "follower")
        if not self._registry.writable:
            return
        beating = lasting(self._heartbeat.run, what="the registry's heartbeat")
        self._begin(beating, "heartbeat", self._beating)
        self._begin(self._supervisor.run(), "supervisor")
        self._begin(self._expire(), "uploads")
        if self._settings.collect_seconds:
            self._begin(lasting(self._caretaker.run, what="the registry's caretaker"), "caretaker")

    async def stop(self) -> None:
        """End the tasks; a job that runs here goes to another replica, or waits for the next start."""
        # It beats until the others have ended, which takes a worker seconds: silence is death to its siblings.
        for tasks in (self._tasks, self._beating):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            tasks.clear()
        if self._registry.writable:
            try:
                await asyncio.wait_for(self._heartbeat.leave(), _LEAVE_SECONDS)
            except (ExpertsError, OSError, TimeoutError) as error:
                _log.warning("the catalogue was not told that this replica ends: %s", error)

    def close(self) -> None:
        """Close connections. Blocks; after `stop`."""
        for calls in (self._beats, self._jobs, self._cares, self._calls):
            calls.close()
        self._registry.close()

    def _begin(
        self, work: Coroutine[Any, Any, None], name: str, among: list[asyncio.Task[None]] | None = None
    ) -> None:
        task = asyncio.create_task(work, name=f"registry-{name}")
        task.add_done_callback(_told)
        (self._tasks if among is None else among).append(task)

    async def _swap(self, snapshot: Snapshot) -> CatalogueFamily:
        family = await self._calls(lambda: self._registry.family_of(snapshot))
        await self._swap_live(family)
        return family

    def _wake(self) -> None:
        self._supervisor.wake()

    def _describe(self, beat: int) -> Replica:
        return Replica(
            id=self.replica,
            beat=beat,
            revision=self.follower.complete,
            build_id=self.follower.snapshot.bundle.build_id,
            url=self._url,
            leases=tuple(
                f"{it.name}@{it.generation}"
                for it in self._live.experts()
                if it.leases or it.state in ("active", "staged", "trial")
            ),
        )

    async def _expire(self) -> None:
        while True:
            with contextlib.suppress(ExpertsError, TwinserveError, OSError):
                await self._calls(self._sources.expire)
            await asyncio.sleep(_EXPIRE_SECONDS)


def _told(task: "asyncio.Task[None]") -> None:
    """A task of the registry that ends by itself has a fault, which must not pass in silence."""
    if not task.cancelled() and task.exception() is not None:
        _log.error("the registry's %s has ended", task.get_name(), exc_info=task.exception())
