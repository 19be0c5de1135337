"""What a server does for its registry unasked: collects garbage, and removes rows that are old enough to go."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from experts.errors import ExpertsError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, Pruned
from experts.registry.verify import collect_garbage
from service.errors import TwinserveError
from service.registrar.calls import Calls
from service.registrar.sink import RegistrySink

_log = logging.getLogger(__name__)

_SYSTEM = Actor()
_SPREAD = 0.2
"""Most that a wait is longer than asked for, of it: replicas that start together drift apart."""

_GRACE_SECONDS = 3600.0
"""Pins guard what is about to be needed. Nobody waits for these blobs to go, so younger ones stay anyway."""

_NEVER = datetime.min.replace(tzinfo=UTC)
"""Before that nothing was."""

_PAUSE_SECONDS = 0.25
"""Between two transactions that remove rows; others, beats above all, get theirs in."""


class Caretaker:
    """Collects and prunes again and again; all replicas may, since each transaction looks for itself.

    Args:
        catalogue, blobs: the registry.
        calls: threads.
        sink: counts.
        seconds: between the end of one round and the next one; the first is that far off too.
        keep_generations: newest ones of an expert that collection leaves.
        keep_jobs_days: how long ended jobs stay, what else `Catalogue.prune` removes with them, and the newest
            generations of retired experts, which a mistake may have retired; 0 is for ever.
        keep_audit_days: how long lines of the audit log stay; 0 is for ever.
        sleep: waits so many seconds.
        now: the wall clock, with its time zone.
        spread: between 0 and 1, anew for each wait.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: Blobs,
        calls: Calls,
        sink: RegistrySink,
        *,
        seconds: float,
        keep_generations: int,
        keep_jobs_days: int,
        keep_audit_days: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._catalogue = catalogue
        self._blobs = blobs
        self._calls = calls
        self._sink = sink
        self._seconds = seconds
        self._keep_generations = keep_generations
        self._keep_jobs_days = keep_jobs_days
        self._keep_audit_days = keep_audit_days
        self._sleep = sleep
        self._now = now
        self._spread = spread
        self._troubled: set[str] = set()

    async def run(self) -> None:
        """Take care until cancelled; trouble with the catalogue or the blobs is waited out."""
        while True:
            await self._sleep(self._seconds * (1 + _SPREAD * self._spread()))
            await self._try("garbage is not collected", self._collect)
            await self._try("old rows are not removed", self._prune)

    async def _try(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except (ExpertsError, TwinserveError, OSError, TimeoutError) as error:
            if what not in self._troubled:
                _log.warning("%s: %s", what, error)
            self._troubled.add(what)
        else:
            self._troubled.discard(what)

    async def _collect(self) -> None:
        retired_before = _before(self._now(), self._keep_jobs_days) or _NEVER
        gone = await self._calls(
            lambda: collect_garbage(
                self._catalogue,
                self._blobs,
                self._keep_generations,
                _SYSTEM,
                retired_before=retired_before,
                grace_seconds=_GRACE_SECONDS,
            )
        )
        self._sink.on_collected(len(gone.generations), gone.blobs, gone.nbytes)

    async def _prune(self) -> None:
        now, gone = self._now(), Pruned()
        jobs_before = _before(now, self._keep_jobs_days)
        audit_before = _before(now, self._keep_audit_days)
        while (
            some := await self._calls(lambda: self._catalogue.prune(jobs_before, audit_before, _SYSTEM))
        ).rows:
            gone += some
            await self._sleep(_PAUSE_SECONDS)
        if gone.rows:
            _log.info(
                "old rows were removed: %d jobs, %d lines of the audit log, %d generations, %d routers",
                gone.jobs,
                gone.audit,
                gone.generations,
                gone.routers,
            )


def _before(now: datetime, days: int) -> datetime | None:
    return now - timedelta(days=days) if days else None
