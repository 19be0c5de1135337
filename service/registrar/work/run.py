"""One attempt of one job: what its steps share."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experts.bundle import ExpertWeights
from experts.errors import StaleRouterError
from experts.registry.catalogue import Catalogue
from experts.registry.records import Job
from experts.registry.work import FileEntry, Stored, StoreTask
from service.core import ExpertKey
from service.errors import TwinserveError
from service.registrar.work.gauge import Gauge
from service.registrar.work.live import Stage
from service.registrar.work.options import WorkOptions
from service.registrar.work.process import Worker
from service.registrar.work.profile import Backgrounds
from service.registrar.work.served import Served, steady

T = TypeVar("T")


class Ask(Protocol):
    """Runs what blocks, on a thread; waits out a database that does not answer."""

    async def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns or raises, but for CatalogueError."""
        ...


class Run:
    """One attempt.

    Args:
        now: the family that is served here at any moment; another one once an admin returns to it.

    Attributes:
        served: the family that the attempt is made for.
        folder: its half-made files.
        worker: its process.
        decided: what is done now cannot be stopped any more; it takes a moment.
        report: what was found, in case that it fails.
    """

    def __init__(
        self,
        job: Job,
        *,
        catalogue: Catalogue,
        live: Stage,
        served: Served,
        now: Callable[[], Served],
        worker: Worker,
        folder: Path,
        options: WorkOptions,
        backgrounds: Backgrounds,
        gauge: Gauge,
        ask: Ask,
    ) -> None:
        self.job = job
        self.catalogue = catalogue
        self.live = live
        self.served = served
        self._now = now
        self.worker = worker
        self.folder = folder
        self.options = options
        self.backgrounds = backgrounds
        self.gauge = gauge
        self.ask = ask
        self.decided = False
        self.report: dict[str, Any] = {}
        self._staged: list[ExpertKey] = []

    def steady(self) -> AbstractContextManager[None]:
        """What is asked of the engine inside is the bundle's that the attempt is made for.

        Raises:
            TransitionError: another bundle is served here by now.
        """
        return steady(self._now, self.served.bundle.manifest.build_id)

    async def stage(self, weights: ExpertWeights) -> None:
        """Have the engine take a generation, for this attempt alone.

        Raises:
            ExpertRejectedError: the model cannot serve it.
        """
        self._staged.append(ExpertKey(weights.name, weights.generation))
        await self.live.stage(weights)

    async def store(self, files: Mapping[Path, FileEntry]) -> None:
        """Into the blob store, pinned first: nobody else knows yet that they are needed.

        Raises:
            BlobError: the store refuses.
            WorkerDiedError: the process ended.
        """
        if not files:
            return
        digests = [entry.sha256 for entry in files.values()]
        await self.ask(lambda: self.catalogue.pin_blobs(self.job.id, digests))
        await self.worker.ask(StoreTask(dict(files)), Stored, self.gauge.follow)

    async def publish(self, call: Callable[[], T]) -> T:
        """The one step that cannot be taken back: from here on the attempt is not stopped.

        Raises:
            StaleRouterError: not yet; it goes on as before.
        """
        self.decided = True
        try:
            return await self.ask(call)
        except StaleRouterError:
            self.decided = False
            raise

    async def clean_up(self) -> None:
        """Withdraw what was staged; what went live stays."""
        for key in self._staged:
            with contextlib.suppress(TwinserveError):  # an engine that has ended holds nothing
                await self.live.unstage(key)
