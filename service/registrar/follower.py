"""Keeps what runs here in step with the catalogue: each new revision is loaded beside, then switched to at once."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from experts.errors import CatalogueError, ExpertsError
from experts.registry.catalogue import Catalogue
from experts.registry.records import Snapshot
from service.errors import (
    ExpertNotLoadedError,
    ExpertUnavailableError,
    RegistryUnavailableError,
)
from service.registrar.calls import Calls
from service.registrar.family import CatalogueFamily
from service.registrar.loading import Loading
from service.registrar.sink import RegistrySink

_log = logging.getLogger(__name__)

_LOOK_GAP_SECONDS = 0.02
"""Between two questions for the revision on behalf of requests that name what is not known here."""

_LONGEST_RETRY_SECONDS = 2.0

_CHECK_SECONDS = 1.0
"""How often the catalogue is asked though it told of nothing: it may not be there any more."""

_ANSWER_SECONDS = 30.0
"""A database that has not answered by then counts as one that does not."""


class Follower:
    """One replica's way from the catalogue's revision to what it serves.

    Whatever fails is tried again, with growing pauses; meanwhile what is loaded serves on.

    Args:
        catalogue: the truth.
        loading: what is served here and brings changes to it.
        swap: serve a bundle that the snapshot names instead of the one that is served; returns when it is.
        calls: threads for what blocks.
        poll_seconds: how often the catalogue is looked at where it does not tell of changes by itself.
        wait_seconds: what `ready_for` waits.
        sink: counts.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        loading: Loading,
        swap: Callable[[Snapshot], Awaitable[CatalogueFamily]],
        calls: Calls,
        sink: RegistrySink,
        *,
        poll_seconds: float,
        wait_seconds: float,
    ) -> None:
        self._catalogue = catalogue
        self._loading = loading
        self._swap = swap
        self._calls = calls
        self._sink = sink
        self._poll_seconds = poll_seconds
        self._wait_seconds = wait_seconds
        self.snapshot = loading.family.snapshot
        """What is served now; experts that could not be loaded are in `broken`."""
        self.known = self.snapshot.revision
        """The catalogue's revision, as last seen."""
        self._begun = False
        self.complete = 0
        """The latest revision that was served with everything that belongs to it; 0 before there was one."""
        self.problem = ""
        """Why the catalogue is not followed; empty while it is."""
        self._reachable = True
        self._seen: Snapshot = self.snapshot
        self._news = asyncio.Event()
        self._moved = asyncio.Condition()
        self._look_lock = asyncio.Lock()
        self._looked = 0.0
        self._stop = threading.Event()

    @property
    def routed(self) -> bool:
        """There is a router."""
        return self.snapshot.router is not None

    @property
    def family(self) -> CatalogueFamily:
        """What is served now, with the way to its files."""
        return self._loading.family

    def broken(self) -> Mapping[str, str]:
        """Generations, as "name@generation" → why they cannot be served here."""
        return self._loading.broken()

    async def run(self) -> None:
        """Follow until cancelled."""
        loop = asyncio.get_running_loop()
        watcher = threading.Thread(
            target=self._watch, args=(loop,), name="twinserve-registry-watch", daemon=True
        )
        watcher.start()
        pause = self._poll_seconds
        try:
            while True:
                try:
                    await self._catch_up()
                    pause = self._poll_seconds
                except Exception as error:  # noqa: BLE001 who stops following serves old experts for ever
                    self._trouble(error)
                    pause = min(pause * 2, _LONGEST_RETRY_SECONDS)
                    await asyncio.sleep(pause)
                    continue
                await self._wait_for_news()
        finally:
            self._stop.set()

    async def reach(self, revision: int, seconds: float) -> bool:
        """Wait until that revision is served; False if it is not in time."""
        if self._brought(revision):
            return True
        self.known = max(self.known, revision)
        self._news.set()
        try:
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(lambda: self._brought(revision))
        except TimeoutError:
            return False
        return True

    async def ready_for(self, names: Collection[str]) -> None:
        """See `Registrar.ready_for`; `name@generation` is one generation of an expert."""
        missing = [name for name in names if not self._serves(name)]
        if not missing:
            return
        deadline = time.monotonic() + self._wait_seconds
        revision = await self._look()
        await self.reach(revision, max(deadline - time.monotonic(), 0))
        for name in missing:
            self._check_served(name)

    def _brought(self, revision: int) -> bool:
        """All of a revision was looked at, what the runtime could not load when it was opened included."""
        return self._begun and self.snapshot.revision >= revision

    def _check_served(self, name: str) -> None:
        if self._serves(name):
            return
        retry = self._loading.retry_seconds(self._seen.aliases.get(name, name))
        if retry is not None:
            raise ExpertUnavailableError(
                f"The expert {name!r} cannot be loaded here now, the server's log says why; try again later.",
                param="model",
                retry_after=max(retry, 1.0),
            )
        if _names(self._seen, name):
            raise ExpertNotLoadedError(
                f"The expert {name!r} is registered and has not reached this server yet; try again.",
                param="model",
                retry_after=1.0,
            )

    def _serves(self, name: str) -> bool:
        return self._loading.serves(self.snapshot.aliases.get(name, name))

    # -- catching up --------------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        """Serve what the catalogue says now, if that is news, or if something could not be loaded before."""
        revision = await self._calls(self._catalogue.revision, _ANSWER_SECONDS)
        self._reachable = True
        self._sink.on_reachable(up=True)
        if revision < self.snapshot.revision:
            _log.warning("the catalogue went back from revision %d to %d", self.snapshot.revision, revision)
            self.known = revision
        self.known = max(self.known, revision)
        self._sink.on_revision(self.snapshot.revision, self.known)
        if self._begun and self.snapshot.revision == self.known and self._loading.due_in() != 0:
            self._well()
            return
        seen = await self._calls(self._catalogue.snapshot)
        if seen is None:
            raise CatalogueError("the catalogue is empty; was its database replaced?")
        self._seen = seen
        self.known = seen.revision
        started = time.monotonic()
        if seen.bundle.build_id != self._loading.family.build_id:
            self._loading.adopt(await self._swap(seen))
        await self._loading.bring(seen)
        async with self._moved:
            self.snapshot = seen
            self._begun = True
            if not self._loading.broken():
                self.complete = seen.revision
            self._moved.notify_all()
        self._well()
        self._sink.on_revision(seen.revision, self.known)
        self._sink.on_broken(len(self._loading.broken()))
        _log.debug("revision %d is served after %.3f s", seen.revision, time.monotonic() - started)

    async def _wait_for_news(self) -> None:
        """Until the watcher tells of a revision, something that failed is due again, or it was silent for long."""
        due = self._loading.due_in()
        wait = _CHECK_SECONDS if due is None else min(due, _CHECK_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._news.wait()
        self._news.clear()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own: every new revision, for as long as it is wanted."""
        while not self._stop.is_set():
            try:
                for revision in self._catalogue.watch(self._stop, self._poll_seconds):
                    if not self._tell(loop, revision):
                        return
            except ExpertsError as error:
                # The task meets the same trouble, and tells of it.
                _log.debug("the catalogue cannot be watched: %s", error)
                self._tell(loop, None)
            self._stop.wait(self._poll_seconds)

    def _tell(self, loop: asyncio.AbstractEventLoop, revision: int | None) -> bool:
        def news() -> None:
            if revision is None or revision > self.snapshot.revision:
                self._news.set()

        try:
            loop.call_soon_threadsafe(news)
        except RuntimeError:  # the loop has ended
            return False
        return True

    async def _look(self) -> int:
        """The catalogue's revision, asked for after this call began; many callers share one question.

        Raises:
            RegistryUnavailableError: it cannot be asked.
        """
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self._wait_seconds or _LOOK_GAP_SECONDS), self._look_lock:
                if self._looked < asked:
                    if not self._reachable:
                        raise CatalogueError(self.problem)
                    await asyncio.sleep(max(self._looked + _LOOK_GAP_SECONDS - time.monotonic(), 0))
                    began = time.monotonic()
                    self.known = max(self.known, await self._calls(self._catalogue.revision))
                    self._looked = began
        except (CatalogueError, TimeoutError) as error:
            raise RegistryUnavailableError(
                "The registry cannot be asked about a name that is not known here; what is loaded serves. "
                "Try again later.",
                param="model",
                retry_after=1.0,
            ) from error
        return self.known

    def _trouble(self, error: BaseException) -> None:
        told = f"{type(error).__name__}: {error}"
        if told != self.problem:
            _log.warning("the registry is not followed, what is loaded serves on: %s", told)
        self.problem = told
        if isinstance(error, (CatalogueError, TimeoutError)):
            self._reachable = False
            self._sink.on_reachable(up=False)

    def _well(self) -> None:
        if self.problem:
            _log.info("the registry is followed again")
        self.problem = ""


def _names(snapshot: Snapshot, name: str) -> bool:
    """Whether a snapshot has an expert, or that generation of it."""
    base, _, number = snapshot.aliases.get(name, name).partition("@")
    if not number:
        return base in snapshot.experts
    live = [*(each for key, each in snapshot.experts.items() if key == base), *snapshot.trial_generations]
    return any(each.name == base and str(each.number) == number for each in live)
