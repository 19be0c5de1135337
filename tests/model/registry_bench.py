"""One replica's registry without HTTP: real catalogue, blobs, runtime, follower and supervisor over a tiny family."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from experts.registry.records import ENDED, Actor, Job, Snapshot
from service.registrar.calls import Calls
from service.registrar.checks import Registration
from service.registrar.family import CatalogueFamily
from service.registrar.follower import Follower
from service.registrar.loading import Loading
from service.registrar.opening import Registry, open_registry
from service.registrar.sources import Sources
from service.registrar.work import Supervisor, WorkOptions
from service.registry_metrics import RegistryMetrics
from service.runtime import RuntimeSwitch, open_runtime
from service.serve import runtime_config
from service.settings import Settings

ADMIN = Actor("tester", "127.0.0.1")


class Bench:
    """A replica at work.

    Attributes:
        ended: (kind, state) of jobs that ended here.
    """

    def __init__(self, settings: Settings, registry: Registry, runtime: RuntimeSwitch, calls: Calls) -> None:
        self.settings = settings
        self.registry = registry
        self.catalogue = registry.catalogue
        self.blobs = registry.blobs
        self.runtime = runtime
        self.calls = calls
        self.ended: list[tuple[str, str]] = []
        metrics = RegistryMetrics(CollectorRegistry())
        self.loading = Loading(registry.family, runtime, calls, metrics, lazy=False)
        self.follower = Follower(
            registry.catalogue, self.loading, self._swap, calls, metrics, poll_seconds=0.02, wait_seconds=5
        )
        self.sources = Sources.of(settings, registry.state, registry.blobs, registry.catalogue)
        self.options = WorkOptions.of(settings, registry.state / "work", registry.store)

    def supervisor(self, replica: str = "here", **options: Any) -> Supervisor:
        """One that is not running yet."""
        return Supervisor(
            self.catalogue,
            self.runtime,
            lambda: self.loading.family,
            self.sources,
            replace(self.options, **options),
            replica,
            calls=self.calls,
            follow=self.follow,
            ended=lambda kind, state, _: self.ended.append((kind, state)),
        )

    @contextlib.asynccontextmanager
    async def working(self, replica: str = "here", **options: Any) -> AsyncIterator[Supervisor]:
        """A supervisor at work until the block ends."""
        supervisor = self.supervisor(replica, **options)
        task = asyncio.create_task(supervisor.run())
        try:
            yield supervisor
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def submit(self, name: str, path: str, **more: Any) -> Job:
        """Queue a registration from a folder below the root."""
        asked = Registration(name, path=path, **more)
        return self.catalogue.submit(
            "register",
            asked.request(),
            ADMIN,
            name=name,
            replace=asked.replace,
            expected=asked.expected_generation,
            limit=64,
        )

    async def end_of(self, job: Job, seconds: float = 60) -> Job:
        """The job once it has ended, this replica serves what it made, and has cleaned up after it."""
        deadline = time.monotonic() + seconds
        while True:
            found = await asyncio.to_thread(self.catalogue.job, job.id)
            if found.state in ENDED and not self.half_made():
                await self.follow()
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)

    async def follow(self) -> None:
        """Serve what the catalogue says."""
        await self.follower.reach(await asyncio.to_thread(self.catalogue.revision), 30)

    def served(self) -> dict[str, int]:
        """Expert → generation that the engine gives to whoever names it."""
        return {it.name: it.generation for it in self.runtime.experts() if it.state == "active"}

    def staged(self) -> list[str]:
        """Generations that the engine holds beside those."""
        return [f"{it.name}@{it.generation}" for it in self.runtime.experts() if it.state != "active"]

    def half_made(self) -> list[str]:
        """What lies in the folder of half-made files, but for the features of neutral prompts."""
        # Not pathlib's walk, which stumbles over what is being removed.
        found = [Path(parent, name) for parent, _, names in os.walk(self.options.folder) for name in names]
        return [str(it) for it in found if not it.name.startswith("neutral-")]

    async def _swap(self, snapshot: Snapshot) -> CatalogueFamily:
        """Serve another bundle."""
        family = await self.calls(lambda: self.registry.family_of(snapshot))
        await self.runtime.swap(lambda: open_runtime(family, runtime_config(self.settings)))
        return family


@contextlib.asynccontextmanager
async def bench(bundle: Path, root: Path, state: Path, **options: Any) -> AsyncIterator[Bench]:
    """A replica that follows its catalogue until the block ends. No supervisor works yet."""
    settings = Settings(
        bundle=bundle,
        experts_root=root,
        state_dir=state,
        dtype="float32",
        threads=1,
        mix_mode="factored",
        native="off",
        kv_cache_bytes=2**24,
        **options,
    )
    registry = open_registry(settings)
    runtime = RuntimeSwitch(open_runtime(registry.family, runtime_config(settings)))
    calls = Calls()
    try:
        made = Bench(settings, registry, runtime, calls)
        follower = asyncio.create_task(made.follower.run())
        try:
            yield made
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
    finally:
        runtime.close()
        calls.close()
        registry.close()


def workers() -> list[int]:
    """Ids of the worker processes that this process has now."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                command = Path("/proc", child, "cmdline").read_bytes()
                if b"entry.py" in command:
                    found.append(int(child))
    return found


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process has ended, or does soon."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def at_stage(monkeypatch: Any, stage: str, act: Callable[[], None], *, times: int = 1) -> list[str]:
    """Do something when a job comes to a stage, as often as said; returns what was done so far."""
    from service.registrar.work.gauge import Gauge

    done: list[str] = []
    original = Gauge.at

    def at(self: Gauge, at: str, share: float = 0.0, tensor: str = "") -> None:
        original(self, at, share, tensor)
        if at == stage and self.stage not in getattr(self, "_met", ()) and len(done) < times:
            self._met = (stage,)  # type: ignore[attr-defined]
            done.append(stage)
            act()

    monkeypatch.setattr(Gauge, "at", at)
    return done


def kill_workers() -> None:
    """As the kernel does when memory is short."""
    import signal

    for pid in workers():
        os.kill(pid, signal.SIGKILL)
