"""Which bundle is served: the first one is adopted, others are switched to by a job, and there is a way back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from sqlalchemy import Row, insert, select, update

from experts.errors import (
    DuplicateExpertError,
    GenerationConflictError,
    RecordNotFoundError,
    TransitionError,
)
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change, storable
from experts.registry.catalogue.ending import Concluding, end_job, end_jobs_of
from experts.registry.catalogue.experts import check_free, go_live
from experts.registry.catalogue.publishing import add_router, insert_router
from experts.registry.catalogue.queueing import allocate
from experts.registry.catalogue.rows import bundle_of, files_row, generation_row, now
from experts.registry.records import Actor, BundleRecord, Generation, Job, RouterGeneration

Absent = Literal["refuse", "retire"]
"""What becomes of experts that serve and are not in the bundle that takes over."""


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
        absent: Absent = "refuse",
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
            TransitionError: an expert that serves is not in the bundle, or the bundle is known already.
        """
        return self._conclude(
            job_id,
            attempt,
            lambda change, row: _switch(
                change, row, bundle, experts, router, result or {}, made_from or {}, absent
            ),
        )

    def return_to(self, build_id: str, actor: Actor, *, absent: Absent = "refuse") -> BundleRecord:
        """Serve a bundle again that another one replaced, with the generations and the router of that moment.

        Experts that were retired since stay so, and disabled ones stay disabled; those that were retired because
        the bundle was left come back. Trials end. For the bundle that serves nothing happens.

        Args:
            absent: what becomes of experts that serve and that the bundle did not have.

        Raises:
            RecordNotFoundError: there is no such bundle.
            TransitionError: it was given up, or never served; or an expert that serves came after it.
        """
        with self._change() as change:
            before = change.served_build()
            row = _bundle_row(change, build_id)
            if build_id == before:
                return bundle_of(row)
            way = row.way_back
            if way is None:
                raise TransitionError(
                    f"the bundle {build_id} never served, or was given up since (the newest one that was replaced "
                    "is kept); build one anew"
                )
            _leave_old(change, before, set(way["experts"]), {}, absent)
            change.build_id = build_id
            check_free(change, row.name)
            columns = tables.bundles.c
            change.connection.execute(
                update(tables.bundles)
                .where(columns.build_id == build_id)
                .values(state="active", way_back=None)
            )
            numbers = _go_back(change, way)
            change.router = None if way["router"] is None else change.router_row(way["router"]).number
            detail = {"from": before, "experts": numbers, "router": change.router}
            change.note(actor, "return", build_id, detail)
            return bundle_of(_bundle_row(change, build_id))


def _bundle_row(change: Change, build_id: str) -> Row[Any]:
    query = select(tables.bundles).where(tables.bundles.c.build_id == build_id)
    row = change.connection.execute(query).one_or_none() if storable(build_id) else None
    if row is None:
        raise RecordNotFoundError(f"there is no bundle {build_id!r}")
    return row


def _go_back(change: Change, way: Mapping[str, Any]) -> dict[str, int]:
    """Put the generations live that a bundle was left with; those that serve by it."""
    numbers = {}
    for name, number in sorted(way["experts"].items()):
        expert = change.known_expert(name)
        state = expert.state
        if state == "retired" and name in way["retired"] and expert.generation == number:
            check_free(change, name)
            state = "active"
        if state == "retired":
            continue
        change.usable_generation(name, number)
        go_live(change, expert, number)
        change.set_expert(name, state=state)
        if state == "active":
            numbers[name] = number
    return numbers


def _switch(
    change: Change,
    row: Row[Any],
    bundle: BundleRecord,
    experts: Sequence[Generation],
    router: RouterGeneration | None,
    result: Mapping[str, Any],
    made_from: Mapping[str, int],
    absent: Absent,
) -> Row[Any]:
    if row.kind != "rebuild":
        raise TransitionError(f"a job of kind {row.kind!r} cannot switch bundles")
    before = change.served_build()
    known = tables.bundles.c.build_id
    there = select(tables.bundles).where(known == bundle.build_id)
    if (same := change.connection.execute(there).one_or_none()) is not None:
        mend = (
            f"POST /admin/bundles/{bundle.build_id}/activate goes back to it"
            if same.way_back
            else "build it anew"
        )
        raise TransitionError(f"the bundle {bundle.build_id} was served before; {mend}")
    _leave_old(change, before, {generation.name for generation in experts}, made_from, absent)
    _insert_bundle(change, replace(bundle, state="active"))
    change.build_id = bundle.build_id
    check_free(change, bundle.name)
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
    change: Change, build_id: str, coming: set[str], made_from: Mapping[str, int], absent: Absent
) -> None:
    """End what belongs to the served bundle, and write down how it was."""
    standing, retired = _standing(change, build_id), []
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
            raise TransitionError(
                f"expert {row.name!r} serves and is not in the bundle; build one with it, or have it retired"
            )
        columns = tables.aliases.c
        change.connection.execute(tables.aliases.delete().where(columns.name == row.name))
        change.left(row.name, row.generation)
        change.set_expert(row.name, state="retired", pinned=False)
        end_jobs_of(change, row.name, "the bundle that is served now has no such expert")
        retired.append(row.name)
    way = {
        "revision": change.revision,
        "experts": standing,
        "retired": retired,
        "router": change.router,
    }
    change.connection.execute(
        update(tables.bundles)
        .where(tables.bundles.c.build_id == build_id)
        .values(state="superseded", way_back=way)
    )


def _standing(change: Change, build_id: str) -> dict[str, int]:
    """Expert → its current generation, of those that a bundle has; disabled ones too."""
    experts, generations = tables.experts.c, tables.generations.c
    rows = change.connection.execute(
        select(experts.name, experts.generation)
        .join(
            tables.generations,
            (generations.name == experts.name) & (generations.number == experts.generation),
        )
        .where(experts.state != "retired", generations.build_id == build_id)
    )
    return {row.name: row.generation for row in rows}


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
