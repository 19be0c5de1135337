"""Which bundle is served: the first one is adopted, others are switched to by a job."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from sqlalchemy import Row, insert, select, update

from experts.errors import DuplicateExpertError, GenerationConflictError, TransitionError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change
from experts.registry.catalogue.ending import Concluding, end_job, end_jobs_of
from experts.registry.catalogue.experts import check_free, go_live
from experts.registry.catalogue.publishing import add_router, insert_router
from experts.registry.catalogue.queueing import allocate
from experts.registry.catalogue.rows import files_row, generation_row, now
from experts.registry.records import Actor, BundleRecord, Generation, Job, RouterGeneration


class Bundles(Concluding):
    """Changes of the bundle. All raise CatalogueError where the database cannot be written."""

    def adopt(
        self, bundle: BundleRecord, experts: Sequence[Generation], router: RouterGeneration | None
    ) -> int:
        """Fill an empty catalogue with what a bundle brings, numbers kept; the revision.

        The bundle that the catalogue serves already changes nothing, and needs no right to write.

        Raises:
            TransitionError: the catalogue serves another build.
        """
        with self._database.read() as connection:
            state = connection.execute(select(tables.registry)).one()
        if state.build_id == bundle.build_id:
            return int(state.revision)
        with self._change() as change:
            if change.build_id == bundle.build_id:
                return change.revision - 1
            if change.build_id is not None:
                raise TransitionError(
                    f"the catalogue serves the bundle {change.build_id}, not {bundle.build_id}; give this one a "
                    "catalogue of its own, or switch to it with POST /admin/bundles"
                )
            _insert_bundle(change, bundle)
            change.build_id = bundle.build_id
            for name, last in _numbers(bundle, experts).items():
                at = now()
                change.connection.execute(
                    insert(tables.experts).values(
                        name=name, state="retired", last=last, pinned=False, created=at, updated=at
                    )
                )
            for generation in experts:
                _insert_generation(change, generation)
                change.set_expert(generation.name, state="active", generation=generation.number)
            if router is not None:
                insert_router(change, router)
                change.router = router.number
            change.note(Actor(), "adopt", bundle.build_id, {"bundle": bundle.name, "experts": len(experts)})
            return change.revision

    def switch_bundle(
        self,
        job_id: str,
        attempt: int,
        bundle: BundleRecord,
        experts: Sequence[Generation],
        router: RouterGeneration | None,
        *,
        result: Mapping[str, Any] | None = None,
        made_from: Mapping[str, int] | None = None,
        absent: Literal["refuse", "retire"] = "refuse",
    ) -> Job:
        """End a job by serving another bundle, with generations of its own.

        The numbers of generations and router are given here; the router's profiles get them too. Trials end.
        Retired experts stay retired and disabled ones disabled. Done again by the same attempt, nothing happens.

        Args:
            made_from: expert → the generation that it was rebuilt from.
            absent: what becomes of experts that serve and are not in the bundle.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more, or was told to stop, which it has by this.
            GenerationConflictError: another generation serves than one was rebuilt from.
            DuplicateExpertError: an expert's name is an alias.
            TransitionError: an expert that serves is not in the bundle, or the bundle was served before.
        """
        return self._conclude(
            job_id,
            attempt,
            lambda change, row: _switch(
                change, row, bundle, experts, router, result or {}, made_from or {}, absent
            ),
        )


def _switch(
    change: Change,
    row: Row[Any],
    bundle: BundleRecord,
    experts: Sequence[Generation],
    router: RouterGeneration | None,
    result: Mapping[str, Any],
    made_from: Mapping[str, int],
    absent: Literal["refuse", "retire"],
) -> Row[Any]:
    if row.kind != "rebuild":
        raise TransitionError(f"a job of kind {row.kind!r} cannot switch bundles")
    before = change.served_build()
    known = tables.bundles.c.build_id
    if change.connection.execute(select(known).where(known == bundle.build_id)).first() is not None:
        raise TransitionError(f"the bundle {bundle.build_id} was served before; build it anew")
    _leave_old(change, {generation.name for generation in experts}, made_from, absent)
    change.connection.execute(update(tables.bundles).where(known == before).values(state="superseded"))
    _insert_bundle(change, replace(bundle, state="active"))
    change.build_id = bundle.build_id
    numbers = {}
    for generation in experts:
        check_free(change, generation.name)
        if generation.name == bundle.name:
            raise DuplicateExpertError(f"{bundle.name!r} is the bundle's name and an expert's; rename one")
        number = allocate(change, generation.name)
        numbers[generation.name] = number
        _insert_generation(change, replace(generation, number=number, job=row.id, build_id=bundle.build_id))
        expert = change.expert_row(generation.name)
        if expert is not None:
            go_live(change, expert, number)
    change.router = None
    if router is not None:
        profiles = {name: numbers[name] for name in router.profiles if name in numbers}
        change.router = add_router(change, replace(router, profiles=profiles, build_id=bundle.build_id))
    detail = {"job": row.id, "from": before, "experts": numbers, "router": change.router}
    change.note(Actor(row.actor, row.address), "switch", bundle.build_id, detail)
    return end_job(change, row, "succeeded", result=result)


def _leave_old(
    change: Change, coming: set[str], made_from: Mapping[str, int], absent: Literal["refuse", "retire"]
) -> None:
    for row in change.connection.execute(select(tables.experts)).all():
        wanted = made_from.get(row.name)
        if row.state != "retired" and wanted is not None and wanted != row.generation:
            raise GenerationConflictError(
                f"expert {row.name!r} is at generation {row.generation} by now, not {wanted}; rebuild again"
            )
        if row.trial is not None:
            change.left(row.name, row.trial["generation"])
        change.set_expert(row.name, trial=None)
        if row.name in coming or row.state != "active" or row.generation is None:
            continue
        if absent == "refuse":
            raise TransitionError(f"expert {row.name!r} serves and is not in the bundle; rebuild again")
        columns = tables.aliases.c
        change.connection.execute(tables.aliases.delete().where(columns.name == row.name))
        change.left(row.name, row.generation)
        change.set_expert(row.name, state="retired", pinned=False)
        end_jobs_of(change, row.name, "the bundle that is served now has no such expert")


def _insert_bundle(change: Change, bundle: BundleRecord) -> None:
    change.connection.execute(
        insert(tables.bundles).values(
            build_id=bundle.build_id,
            name=bundle.name,
            manifest=bundle.manifest,
            files=files_row(bundle.files),
            state=bundle.state,
            created=now(),
        )
    )


def _insert_generation(change: Change, generation: Generation) -> None:
    change.connection.execute(
        insert(tables.generations).values(
            name=generation.name, number=generation.number, created=now(), **generation_row(generation)
        )
    )


def _numbers(bundle: BundleRecord, experts: Sequence[Generation]) -> dict[str, int]:
    """Name → the highest number that the bundle ever gave it; of its retired experts too."""
    found = {generation.name: generation.number for generation in experts}
    entries = json.loads(bundle.manifest or "{}").get("experts", {})
    for name, entry in entries.items():
        found[name] = max(found.get(name, 0), entry["generation"])
    return found
