"""This process among its siblings: says that it lives, and takes up the work of those that do not."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from experts.errors import ExpertsError
from experts.registry.catalogue import Catalogue
from experts.registry.records import Replica
from service.errors import TwinserveError
from service.registrar.calls import Calls
from service.registrar.sink import RegistrySink

_log = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_DEAD_SECONDS = 5.0
"""A beat that stands still for so long, on the watcher's own monotonic clock, is a dead replica's."""

_RUNNING = 10
"""One job runs at a time."""


@dataclass(slots=True)
class _Seen:
    """A sibling's beat, and since when it has been that."""

    beat: int
    since: float


class Heartbeat:
    """Beats once a second, and requeues the jobs of replicas that stopped.

    Args:
        catalogue: where replicas report.
        replica: this replica's id.
        describe: it as it is now, given its beat; called on the event loop. Without an engine there is nothing to
            tell: TwinserveError, and this replica counts as dead.
        calls: threads.
        sink: counts.
        attempts: how often a job may die before it counts as failed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        replica: str,
        describe: Callable[[int], Replica],
        calls: Calls,
        sink: RegistrySink,
        *,
        attempts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue = catalogue
        self._replica = replica
        self._describe = describe
        self._calls = calls
        self._sink = sink
        self._attempts = attempts
        self._clock = clock
        self._beat = 0
        self._seen: dict[str, _Seen] = {}
        self._troubled = False

    async def run(self) -> None:
        """Beat until cancelled; trouble with the catalogue is waited out."""
        while True:
            try:
                await self.beat()
                self._troubled = False
            except (ExpertsError, TwinserveError, OSError, TimeoutError) as error:
                if not self._troubled:
                    _log.warning("this replica cannot report itself: %s", error)
                self._troubled = True
                self._seen.clear()  # nobody could beat meanwhile
            await asyncio.sleep(_BEAT_SECONDS)

    async def beat(self) -> None:
        """Report this replica once, and look at the others.

        Raises:
            CatalogueError: the catalogue cannot be used.
        """
        self._beat += 1
        own = self._describe(self._beat)
        await self._calls(lambda: self._catalogue.beat(own))
        replicas = await self._calls(self._catalogue.replicas)
        silent = await self._calls(lambda: self._silent({replica.id for replica in replicas}))
        dead = self._dead([*(replica for replica in replicas if replica.id != own.id), *silent])
        for replica in dead:
            await self._bury(replica)
        lost = {replica.id for replica in dead}
        newest = max((replica.revision for replica in replicas), default=own.revision)
        self._sink.on_replicas(
            {replica.id: max(newest - replica.revision, 0) for replica in replicas if replica.id not in lost}
        )

    async def leave(self) -> None:
        """Say that this replica ends: its jobs go to others at once, and that counts for none of their attempts."""
        await self._calls(lambda: self._catalogue.requeue(self._replica, None))
        await self._calls(lambda: self._catalogue.drop_replica(self._replica))

    def _silent(self, known: set[str]) -> list[Replica]:
        """Owners of running jobs that do not report themselves: killed before their first beat, or forgotten.

        They have as long to beat as any other.
        """
        running = self._catalogue.jobs(state="running", limit=_RUNNING)
        owners = {job.owner for job in running if job.owner is not None} - known
        return [Replica(owner, 0, 0, "") for owner in sorted(owners)]

    def _dead(self, others: list[Replica]) -> list[Replica]:
        now = self._clock()
        for replica in others:
            seen = self._seen.get(replica.id)
            if seen is None or seen.beat != replica.beat:
                self._seen[replica.id] = _Seen(replica.beat, now)
        present = {replica.id for replica in others}
        self._seen = {name: seen for name, seen in self._seen.items() if name in present}
        return [replica for replica in others if now - self._seen[replica.id].since >= _DEAD_SECONDS]

    async def _bury(self, replica: Replica) -> None:
        jobs = await self._calls(lambda: self._catalogue.requeue(replica.id, self._attempts))
        await self._calls(lambda: self._catalogue.drop_replica(replica.id))
        self._seen.pop(replica.id, None)
        _log.warning(
            "replica %s is dead; its jobs: %s",
            replica.id,
            ", ".join(f"{job.id} is {job.state}" for job in jobs) or "none",
        )
