"""How a job's work goes live: generation and router in one transaction, or nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, func, insert, select, update

from experts.errors import StaleRouterError, TransitionError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change
from experts.registry.catalogue.ending import Concluding, end_job
from experts.registry.catalogue.experts import check_free, check_trial, go_live, set_trial
from experts.registry.catalogue.queueing import check_target
from experts.registry.catalogue.rows import files_row, generation_row, now
from experts.registry.records import Actor, Generation, Job, RouterGeneration, Trial


class Publishing(Concluding):
    """The one way by which something new goes live."""

    def publish(
        self,
        job_id: str,
        attempt: int,
        generation: Generation | None,
        router: RouterGeneration | None,
        fitted_on: int | None,
        *,
        activate: bool = True,
        trial: Trial | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job with success: its generation is ready, and live with its router unless that is not wanted.

        Published again by the same attempt, as after a broken connection, nothing more happens.

        Args:
            generation: the job's, ready, with its files; None for a job that makes only a router.
            router: what knows it; its number is given here. None keeps the current router.
            fitted_on: the router generation that `router` was made from; None where there was none.
            activate: let it serve. An expert that is pinned keeps its generation, and the router, all the same.
            trial: try it out instead; its router is `router` where one is given.
            result: of the job.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more, or was told to stop, which it has by this.
            StaleRouterError: another router is current than the one it was fitted on; fit it again.
            GenerationConflictError, DuplicateExpertError, UnknownExpertError: another generation is current than
                the registration was to replace.
            TransitionError: another bundle is served than it was made for.
        """
        return self._conclude(
            job_id,
            attempt,
            lambda change, row: _publish(
                change, row, generation, router, fitted_on, activate, trial, result or {}
            ),
        )


def _publish(
    change: Change,
    row: Row[Any],
    generation: Generation | None,
    router: RouterGeneration | None,
    fitted_on: int | None,
    activate: bool,
    trial: Trial | None,
    result: Mapping[str, Any],
) -> Row[Any]:
    detail: dict[str, Any] = {"job": row.id}
    made = False
    if (row.kind == "register") != (generation is not None):
        raise TransitionError(f"a job of kind {row.kind!r} cannot publish this")
    if router is not None:
        if change.router != fitted_on:
            raise StaleRouterError(
                f"the router was fitted on router generation {fitted_on}, and {change.router} is current by now; "
                "fit it again"
            )
        _check_build(change, router.build_id)
    if generation is not None:
        _make_ready(change, row, generation)
    number = None if router is None else add_router(change, router)
    if generation is not None:
        made = _expose(change, row, generation, number, activate, trial)
        detail |= {"generation": generation.number, "live": made}
    elif router is not None:
        _check_profiles(change, router)
        made = True
    if number is not None and made:
        change.router = number
        detail["router"] = number
    change.note(Actor(row.actor, row.address), "publish", row.name or row.id, detail)
    return end_job(change, row, "succeeded", result=result)


def _make_ready(change: Change, row: Row[Any], generation: Generation) -> None:
    if (generation.name, generation.number) != (row.name, row.generation):
        raise TransitionError(
            f"the job {row.id} makes {row.name}@{row.generation}, not {generation.name}@{generation.number}"
        )
    if generation.state != "ready" or not generation.files:
        raise TransitionError(f"{generation.name}@{generation.number} is not ready, or has no files")
    _check_build(change, generation.build_id)
    columns = tables.generations.c
    change.connection.execute(
        update(tables.generations)
        .where(columns.name == row.name, columns.number == row.generation)
        .values(generation_row(replace(generation, job=row.id)))
    )


def _expose(
    change: Change,
    row: Row[Any],
    generation: Generation,
    router: int | None,
    activate: bool,
    trial: Trial | None,
) -> bool:
    """Whether it went live."""
    name, number = generation.name, generation.number
    expert = change.expert_row(name)
    if expert is None:
        raise TransitionError(f"there is no expert {name!r}")
    check_free(change, name)
    back = expert.state == "retired"
    pinned = expert.pinned and not back
    live = activate and trial is None and not pinned
    if live or expert.generation is None:
        check_target(change, name, row.replaces, row.expected)
    if back:
        # What was retired does not come back because something new takes its name.
        change.set_expert(name, state="active", pinned=False, **({} if live else {"generation": None}))
    if live:
        go_live(change, expert, number)
    if trial is not None:
        tried = replace(trial, name=name, generation=number, router=router or trial.router)
        check_trial(change, None if back else expert.generation, tried)
        set_trial(change, expert, tried)
    return live


def add_router(change: Change, router: RouterGeneration) -> int:
    """Keep a new router generation; its number."""
    highest = change.connection.execute(select(func.max(tables.routers.c.number))).scalar_one()
    number: int = (highest or 0) + 1
    insert_router(change, replace(router, number=number))
    return number


def insert_router(change: Change, router: RouterGeneration) -> None:
    """Keep a router generation under its own number."""
    change.connection.execute(
        insert(tables.routers).values(
            number=router.number,
            build_id=router.build_id,
            profiles=dict(router.profiles),
            files=files_row(router.files),
            reason=router.reason,
            created=now(),
        )
    )


def _check_profiles(change: Change, router: RouterGeneration) -> None:
    """A router that was made for generations that serve no more is as stale as one made from an old router."""
    before = {} if change.router is None else change.router_row(change.router).profiles
    for name, number in router.profiles.items():
        row = change.expert_row(name)
        if before.get(name) != number and (row is None or row.generation != number):
            raise StaleRouterError(
                f"the router was fitted to {name}@{number}, which does not serve; fit it again"
            )


def _check_build(change: Change, build_id: str) -> None:
    if build_id != change.build_id:
        raise TransitionError(
            f"it was made for the bundle {build_id}, and {change.build_id} is served by now; register it again"
        )
