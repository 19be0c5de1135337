"""How a replica makes a change of the catalogue: off the event loop, audited if refused, and followed at once."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experts.errors import CatalogueError, ExpertsError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, BundleRecord, Job, JobKind
from service.errors import RegistryUnavailableError, StorageFullError
from service.registrar.calls import Calls
from service.registrar.follower import Follower
from service.registrar.live import LiveExperts
from service.registrar.sink import RegistrySink
from service.registrar.sources import Sources
from service.registrar.translate import translated

T = TypeVar("T")

UNUSABLE = (RegistryUnavailableError, StorageFullError)
"""What a catalogue that cannot be used now is told as, that of a full disk too; work that can do without goes on."""

_FOLLOW_SECONDS = 10.0
"""What a change waits for this replica to serve it; it is made all the same."""


class Changing:
    """What `Registrar` consists of. Methods are for the event loop; database and disk wait on threads.

    Every change returns when this replica serves it, or after a while all the same. All of them raise
    RegistryUnavailableError where the catalogue or the blobs cannot be used.

    Args:
        catalogue: the truth.
        blobs: the files.
        live: what runs here.
        follower: keeps it in step with the catalogue.
        sources: where fine-tunes come from.
        calls: threads for what blocks.
        sink: counts.
        wake: called when there may be something to do for whoever runs jobs.
        problem: what keeps those from being run here; nothing while all is well.
        fetch: brings a bundle onto this machine's disk. Blocks; raises BundleError or BlobError if it is nowhere.
        limit: jobs that run or wait.
        keep_generations: newest ones of an expert that garbage collection leaves.
        replica: this process's id.
        writable: False refuses every change.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: Blobs,
        live: LiveExperts,
        follower: Follower,
        sources: Sources,
        calls: Calls,
        sink: RegistrySink,
        wake: Callable[[], None],
        *,
        limit: int,
        keep_generations: int,
        replica: str,
        writable: bool,
        fetch: Callable[[BundleRecord], object],
        problem: Callable[[], str] = str,
    ) -> None:
        self.catalogue = catalogue
        self.blobs = blobs
        self._live = live
        self._follower = follower
        self.sources = sources
        self._calls = calls
        self._sink = sink
        self._wake = wake
        self._limit = limit
        self._keep = keep_generations
        self._replica = replica
        self._writable = writable
        self._fetch = fetch
        self._problem = problem

    async def _submit(
        self,
        kind: JobKind,
        request: Mapping[str, Any],
        actor: Actor,
        key: str | None,
        *,
        name: str | None = None,
        replace: bool = False,
        expected: int | None = None,
        precondition: bool = False,
    ) -> Job:
        return await self._change(
            kind,
            name or kind,
            actor,
            lambda: self.catalogue.submit(
                kind,
                request,
                actor,
                name=name,
                replace=replace,
                expected=expected,
                precondition=precondition,
                idempotency_key=key,
                limit=self._limit,
            ),
            precondition=precondition,
            submitting=True,
        )

    async def _change(
        self,
        action: str,
        target: str,
        actor: Actor,
        change: Callable[[], T],
        *,
        precondition: bool = False,
        submitting: bool = False,
    ) -> T:
        """Make a change, and serve it; one that is refused is audited too."""
        self._check_writable()
        with translated(precondition=precondition, submitting=submitting):
            try:
                made = await self._calls(change)
            except CatalogueError:
                raise
            except ExpertsError as error:
                await self._refused(actor, action, target, error)
                raise
        self._wake()
        if not submitting:
            await self.follow()
        return made

    async def _refused(self, actor: Actor, action: str, target: str, error: ExpertsError) -> None:
        detail = {"message": str(error)}
        with contextlib.suppress(ExpertsError):
            await self._calls(
                lambda: self.catalogue.record(
                    actor, action, target, f"refused: {type(error).__name__}", detail
                )
            )

    async def follow(self) -> None:
        """Return when this replica serves what the catalogue has now, or after a while."""
        with contextlib.suppress(*UNUSABLE):
            await self._follower.reach(await self._ask(self.catalogue.revision), _FOLLOW_SECONDS)

    async def _ask(self, question: Callable[..., T], *arguments: Any) -> T:
        with translated():
            return await self._calls(lambda: question(*arguments))

    def _check_writable(self) -> None:
        if not self._writable:
            raise RegistryUnavailableError(
                "The registry's folder or database cannot be written (TWINSERVE_STATE_DIR, "
                "TWINSERVE_CATALOGUE), so nothing can be changed; what is loaded serves.",
                retry_after=60.0,
            )
