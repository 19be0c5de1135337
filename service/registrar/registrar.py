"""The registry as the API sees it: a change is a transaction of the catalogue, which this replica then follows."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experts.registry.catalogue import Absent
from experts.registry.records import Actor, AuditEntry, BundleRecord, Replica, RouterGeneration
from experts.registry.verify import Collected, collect_garbage
from service.errors import InvalidRequestError, WrongStateError
from service.registrar.changing import UNUSABLE
from service.registrar.experts import ExpertChanges
from service.registrar.family import CatalogueFamily
from service.registrar.jobs import JobChanges
from service.registrar.status import RegistryState
from service.registrar.translate import translated


class Registrar(ExpertChanges, JobChanges):
    """One replica's way to the catalogue. Methods are for the event loop; database and disk wait on threads.

    Every change returns when this replica serves it, or after a while all the same. All of them raise
    RegistryUnavailableError where the catalogue or the blobs cannot be used.
    """

    async def aliases(self) -> Mapping[str, str]:
        """Alias → expert."""
        return await self._ask(self.catalogue.aliases)

    async def set_alias(self, alias: str, name: str, actor: Actor) -> None:
        """Let another name stand for an expert.

        Raises:
            InvalidRequestError: an impossible alias.
            ExpertNotFoundError: there is no such expert.
            WrongStateError: the alias is the name of an expert or of the bundle.
        """
        await self._change("alias", alias, actor, lambda: self.catalogue.set_alias(alias, name, actor))

    async def remove_alias(self, alias: str, actor: Actor) -> None:
        """Take an alias back.

        Raises:
            RecordNotFoundError: there is none of that name.
        """
        await self._change("unalias", alias, actor, lambda: self.catalogue.remove_alias(alias, actor))

    async def audit(
        self, *, limit: int = 100, before: int | None = None, target: str | None = None
    ) -> Sequence[AuditEntry]:
        """Changes and refused changes, newest first; `before` is the id of the last one of the page before."""
        return await self._ask(lambda: self.catalogue.audit(limit=limit, before=before, target=target))

    async def bundles(self) -> Sequence[BundleRecord]:
        """Every bundle that the catalogue knows: the one that serves, then the one that was replaced last."""
        return await self._ask(self.catalogue.bundles)

    async def return_to(self, build_id: str, actor: Actor, *, retire_absent: bool = False) -> BundleRecord:
        """Serve a bundle again that another one replaced, with the generations of that moment.

        Args:
            build_id: the bundle's.
            actor: who asks.
            retire_absent: experts that came after it are retired; else they refuse it.

        Raises:
            RecordNotFoundError: there is no such bundle.
            WrongStateError: it was given up, or is not on this server's disk either; or an expert that serves came
                after it.
            ConflictError: the name of an expert that comes back is an alias.
            StorageFullError: memory does not hold two bundles.
        """
        await self._have(build_id)
        absent: Absent = "retire" if retire_absent else "refuse"
        bundle = await self._change(
            "return",
            build_id,
            actor,
            lambda: self.catalogue.return_to(build_id, actor, absent=absent),
        )
        # A job that was to fit the router to one of them ended when the bundle was left.
        snapshot = await self._ask(self.catalogue.snapshot)
        profiles = {} if snapshot is None or snapshot.router is None else snapshot.router.profiles
        for name, generation in snapshot.experts.items() if snapshot is not None else ():
            if profiles.get(name, generation.number) != generation.number:
                await self._reprofile(generation, actor)
        return bundle

    async def _have(self, build_id: str) -> None:
        """Have a bundle here that may be returned to: once the catalogue says so, nobody could start without it."""
        if build_id == self._follower.family.build_id:
            return
        for record in await self._ask(self.catalogue.bundles):
            if record.build_id == build_id and record.left is not None:
                self._live.check_room()
                try:
                    await self._ask(self._fetch, record)
                except InvalidRequestError as error:
                    raise WrongStateError(
                        f"The bundle {build_id} cannot serve again from here: the registry has no files of it, and "
                        "this server was started on another folder (TWINSERVE_BUNDLE). Ask a server of that folder."
                    ) from error

    async def routers(self) -> Sequence[RouterGeneration]:
        """Every router generation that was not pruned, newest first."""
        return await self._ask(self.catalogue.routers)

    async def state(self) -> RegistryState:
        """Revisions, replicas and what is broken; never fails for want of the catalogue."""
        problem = self._follower.problem or self._problem()
        replicas: list[Replica] = []
        try:
            replicas = list(await self._ask(self.catalogue.replicas))
        except UNUSABLE as error:
            problem = problem or error.message
        snapshot = self._follower.snapshot
        return RegistryState(
            revision=self._follower.known,
            served_revision=snapshot.revision,
            build_id=snapshot.bundle.build_id,
            replica=self._replica,
            replicas=replicas,
            broken=self._follower.broken(),
            writable=self._writable,
            problem=problem,
        )

    async def collect_garbage(self, actor: Actor, keep: int | None = None) -> Collected:
        """Remove old generations beyond what is kept, and blobs that nothing needs.

        Args:
            actor: who asks.
            keep: newest generations of each expert that stay; the server's setting if not given.

        Raises:
            StorageFullError, RegistryUnavailableError: the store cannot be used.
        """
        self._check_writable()
        with translated():
            collected = await self._calls(
                lambda: collect_garbage(self.catalogue, self.blobs, keep or self._keep, actor)
            )
        self._sink.on_collected(len(collected.generations), collected.blobs, collected.nbytes)
        return collected

    @property
    def family(self) -> CatalogueFamily:
        """What this replica serves, with the way to its files."""
        return self._follower.family

    async def exported(self, actor: Actor, target: str, detail: Mapping[str, Any]) -> None:
        """Put into the audit log that weights left the server, if it can be written."""
        with contextlib.suppress(*UNUSABLE):
            self._check_writable()
            await self._ask(self.catalogue.record, actor, "export", target, "ok", detail)

    def resolve(self, model: str) -> str:
        """The expert that an alias stands for; any other name as it is."""
        return self._follower.snapshot.aliases.get(model, model)

    def served_aliases(self) -> Mapping[str, str]:
        """Alias → expert, of what this replica serves."""
        return self._follower.snapshot.aliases

    async def ready_for(self, names: Collection[str]) -> None:
        """Wait until this replica serves these experts, if the catalogue has them. Unknown names return at once.

        Raises:
            ExpertNotLoadedError: one is registered and does not get here in time.
            ExpertUnavailableError: one cannot be loaded here.
            RegistryUnavailableError: the catalogue cannot be asked about one that is not known here.
        """
        await self._follower.ready_for(names)
