"""From a snapshot to one live change: what is missing is loaded beside, and what cannot be is left out."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from experts.errors import (
    BlobError,
    CatalogueError,
    CorruptBlobError,
    ExpertsError,
    MissingBlobError,
)
from experts.registry.records import RouterGeneration, Snapshot
from experts.routing import Router, among
from service.core import ExpertKey
from service.engine.change import LiveChange, LiveTrial
from service.errors import ExpertRejectedError
from service.registrar.calls import Calls
from service.registrar.family import CatalogueFamily
from service.registrar.live import LiveExperts
from service.registrar.sink import RegistrySink

_log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why something of the snapshot cannot be had.

    Attributes:
        passing: the store or the disk did not answer; what was served before serves on meanwhile.
    """

    reason: str
    attempts: int
    retry_at: float
    passing: bool


class Loading:
    """What the runtime has of a family, and how it comes to have what a snapshot says. Used by one task.

    A generation whose files are damaged or do not fit is left out: whoever names its expert is told so, and gets
    no other generation of it. Where only the store does not answer, the generation before serves on.

    Args:
        family: that the runtime was opened from.
        live: the runtime.
        calls: threads for reading.
        sink: counts.
        lazy: slots are limited: generations are read when they are wanted, not before.
    """

    def __init__(
        self, family: CatalogueFamily, live: LiveExperts, calls: Calls, sink: RegistrySink, *, lazy: bool
    ) -> None:
        self._live = live
        self._calls = calls
        self._sink = sink
        self._lazy = lazy
        self._failures: dict[str, _Failure] = {}
        self._routers: dict[int, Router] = {}
        self.family = family
        self._current: dict[str, int] = {}
        self.adopt(family)

    def adopt(self, family: CatalogueFamily) -> None:
        """The runtime serves another family from now on, as it was opened from it."""
        self.family = family
        self._routers.clear()
        self._failures.clear()
        self._current = {it.name: it.generation for it in self._live.experts() if it.state == "active"}

    def serves(self, name: str) -> bool:
        """Whether requests can name the expert, or `name@generation`."""
        base, _, number = name.partition("@")
        if not number:
            return base in self._current
        return str(self._current.get(base)) == number or any(
            it.name == base and str(it.generation) == number and it.state != "retired"
            for it in self._live.experts()
        )

    def broken(self) -> Mapping[str, str]:
        """Generations, as "name@generation" → why they cannot be had."""
        return {what: failure.reason for what, failure in self._failures.items()}

    def retry_seconds(self, name: str) -> float | None:
        """When the expert is tried again that cannot be had; None for all others."""
        base = name.partition("@")[0]
        for what, failure in self._failures.items():
            if what.partition("@")[0] == base:
                return max(failure.retry_at - time.monotonic(), 0.0)
        return None

    def due_in(self) -> float | None:
        """Seconds until something that failed should be tried again; None where nothing failed."""
        if not self._failures:
            return None
        return max(min(it.retry_at for it in self._failures.values()) - time.monotonic(), 0.0)

    async def bring(self, snapshot: Snapshot) -> None:
        """Serve a snapshot of the family's bundle from the next step on, as far as it can be had.

        Raises:
            TwinserveError: the runtime does not take the change; nothing has changed then.
        """
        self.family.learn(snapshot)
        self._forget_old(snapshot)
        staged: list[ExpertKey] = []
        try:
            publish = [key for key in self._news(snapshot) if await self._have(key, staged)]
            trials = await self._trials(snapshot, staged)
            router = await self._router(snapshot.router)
            lost = {name for name in self._current if self._lost(name, snapshot)}
            names = (set(self._current) - lost) | {key.name for key in publish}
            change = LiveChange(
                publish=tuple(publish),
                retire=tuple(sorted(lost - {key.name for key in publish})),
                router=among(router, names),
                trials=tuple(trials),
            )
            await self._live.apply(change)
        except BaseException:
            for key in staged:
                await self._live.unstage(key)
            raise
        for name in lost:
            self._current.pop(name, None)
        self._current.update((key.name, key.generation) for key in publish)
        # Not before they serve: who asks in between is told that it fails, not that it never failed.
        for key in (*publish, *(trial.key for trial in trials)):
            self._failures.pop(str(key), None)
        self._keep_routers(snapshot)
        for key in set(staged) - set(publish):
            # Its trial holds it from now on, and lets it go in the end.
            await self._live.unstage(key)

    def _news(self, snapshot: Snapshot) -> list[ExpertKey]:
        return [
            ExpertKey(name, generation.number)
            for name, generation in sorted(snapshot.experts.items())
            if self._current.get(name) != generation.number
        ]

    def _lost(self, name: str, snapshot: Snapshot) -> bool:
        """A current expert that goes: it is not in the snapshot, or is broken in the generation that is."""
        generation = snapshot.experts.get(name)
        if generation is None:
            return True
        failure = self._failures.get(f"{name}@{generation.number}")
        return failure is not None and not failure.passing

    async def _have(self, key: ExpertKey, staged: list[ExpertKey]) -> bool:
        """Whether a generation is in memory, or can be loaded when it is wanted; reads it if need be."""
        if self._lazy:
            return True
        failure = self._failures.get(str(key))
        if failure is not None and failure.retry_at > time.monotonic():
            return False
        if any(
            it.state in ("staged", "trial") and (it.name, it.generation) == (key.name, key.generation)
            for it in self._live.experts()
        ):
            return True
        began = time.monotonic()
        try:
            weights = await self._calls(lambda: self.family.load(key.name, key.generation))
            await self._live.stage(weights)
        except (ExpertsError, ExpertRejectedError, OSError) as error:
            self._fail(str(key), error)
            self._sink.on_load(time.monotonic() - began, failed=True)
            return False
        staged.append(key)
        self._sink.on_load(time.monotonic() - began, failed=False)
        return True

    async def _trials(self, snapshot: Snapshot, staged: list[ExpertKey]) -> list[LiveTrial]:
        found = []
        for trial in snapshot.trials:
            key = ExpertKey(trial.name, trial.generation)
            had = trial.kind == "shadow" or await self._have(key, staged)
            if not had or trial.name not in snapshot.experts:
                continue
            router = None
            if trial.router is not None:
                whole = await self._router(snapshot.trial_routers[trial.router])
                router = among(whole, set(snapshot.experts))
            found.append(LiveTrial(key, None, trial.kind, trial.percent, router))
        return found

    async def _router(self, generation: RouterGeneration | None) -> Router | None:
        """A router, remembered. Raises ExpertsError if it cannot be had: no other one may take its place."""
        if generation is None:
            return None
        known = self._routers.get(generation.number)
        if known is None:
            known = await self._calls(lambda: self.family.reader.router(generation))
            self._routers[generation.number] = known
        return known

    def _keep_routers(self, snapshot: Snapshot) -> None:
        kept = {*snapshot.trial_routers, *((snapshot.router.number,) if snapshot.router else ())}
        for number in set(self._routers) - kept:
            del self._routers[number]

    def _fail(self, what: str, error: Exception) -> None:
        earlier = self._failures.get(what)
        attempts = earlier.attempts + 1 if earlier else 1
        delay = min(_FIRST_RETRY_SECONDS * 2.0 ** min(attempts - 1, 16), _LONGEST_RETRY_SECONDS)
        passing = _passing(error)
        if earlier is None or earlier.reason != str(error):
            _log.error("expert %s is not served here: %s", what, error)
        self._failures[what] = _Failure(str(error), attempts, time.monotonic() + delay, passing)

    def _forget_old(self, snapshot: Snapshot) -> None:
        wanted = {
            f"{it.name}@{it.number}" for it in (*snapshot.experts.values(), *snapshot.trial_generations)
        }
        for what in set(self._failures) - wanted:
            del self._failures[what]


def _passing(error: Exception) -> bool:
    """The same may succeed later without anybody mending a file."""
    if isinstance(error, (MissingBlobError, CorruptBlobError)):
        return False
    return isinstance(error, (BlobError, CatalogueError, OSError))
