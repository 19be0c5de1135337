"""How jobs enter the queue: whether they may, and which generation they will make."""

from typing import Any

from sqlalchemy import Row, func, insert, select

from experts.errors import (
    DuplicateExpertError,
    GenerationConflictError,
    IdempotencyError,
    RegistryFullError,
    TransitionError,
    UnknownExpertError,
)
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change, plain, storable
from experts.registry.catalogue.ending import OPEN
from experts.registry.catalogue.reading import job_row
from experts.registry.catalogue.rows import now, progress_row
from experts.registry.records import Actor, Progress, new_id


def check_target(
    change: Change, name: str, replaces: bool, expected: int | None, precondition: bool = False
) -> None:
    """Whether a registration may go to this name.

    Raises:
        DuplicateExpertError, UnknownExpertError, GenerationConflictError: it may not.
    """
    row = change.expert_row(name)
    used = row is not None and row.state != "retired" and row.generation is not None
    if expected is not None:
        if not used:
            message = f"there is no expert {name!r} whose generation {expected} could be replaced"
            raise GenerationConflictError(message) if precondition else UnknownExpertError(message)
        if row is not None and row.generation != expected:
            raise GenerationConflictError(
                f"expert {name!r} is at generation {row.generation}, not {expected}; look again and retry"
            )
    elif used and not replaces:
        raise DuplicateExpertError(
            f"expert {name!r} exists; give the generation to replace (expected_generation), or another name"
        )


def queue(
    change: Change,
    actor: Actor,
    asked: dict[str, Any],
    limit: int | None,
    precondition: bool,
    idempotency_key: str | None,
) -> Row[Any]:
    """Queue a job, and begin the generation that it is to make.

    Args:
        asked: columns of the job that say what was asked for.

    Raises:
        RegistryFullError, TransitionError, DuplicateExpertError, UnknownExpertError, GenerationConflictError: it may
            not be queued.
    """
    build = change.served_build()
    columns, run = tables.jobs.c, change.connection.execute
    waiting = run(select(func.count()).select_from(tables.jobs).where(columns.state.in_(OPEN))).scalar_one()
    if limit is not None and waiting >= limit:
        raise RegistryFullError(f"{waiting} jobs run or wait, and {limit} may; try again later")
    job_id, number, name = new_id("job"), None, asked["name"]
    _check_alone(change, asked["kind"], name)
    if asked["kind"] == "register":
        if name is None:
            raise TransitionError("a registration needs the expert's name")
        check_target(change, name, asked["replaces"], asked["expected"], precondition)
        _check_trial(change, name, asked["request"])
        _check_name_is_free(change, name, build)
        number = allocate(change, name)
        empty = {"files": {}, "origin": {}, "report": {}, "created": now()}
        key = {"name": name, "number": number, "build_id": build, "state": "registering", "job": job_id}
        run(insert(tables.generations).values(**key, **empty))
    turn = (run(select(func.max(columns.turn))).scalar_one() or 0) + 1
    run(
        insert(tables.jobs).values(
            **asked,
            turn=turn,
            id=job_id,
            state="queued",
            actor=plain(actor.name),
            address=plain(actor.address),
            generation=number,
            idempotency_key=idempotency_key,
            attempt=0,
            cancelling=False,
            progress=progress_row(Progress()),
            result={},
            created=now(),
        )
    )
    return job_row(change.connection, job_id)


def allocate(change: Change, name: str) -> int:
    """The next number of a name, which is given to nobody else ever."""
    row = change.expert_row(name)
    if row is not None:
        number: int = row.last + 1
        change.set_expert(name, last=number)
        return number
    at = now()
    change.connection.execute(
        insert(tables.experts).values(name=name, state="active", last=1, pinned=False, created=at, updated=at)
    )
    return 1


def _check_trial(change: Change, name: str, request: dict[str, Any]) -> None:
    """A trial runs beside what serves: refused now, not when all its work is done.

    Raises:
        TransitionError: nothing of that name serves.
    """
    row = change.expert_row(name)
    if request.get("trial") and (row is None or row.state == "retired" or row.generation is None):
        raise TransitionError(
            f"expert {name!r} has no generation that serves, beside which another could be tried; "
            "leave 'trial' out"
        )


def _check_alone(change: Change, kind: str, name: str | None) -> None:
    """Registrations of one expert, and rebuilds, come one after the other."""
    columns = tables.jobs.c
    if kind == "reprofile":
        return
    same = [columns.kind == kind, columns.state.in_(OPEN)]
    if kind == "register":
        same.append(columns.name == name)
    other = change.connection.execute(select(columns.id).where(*same)).scalar()
    if other is not None:
        what = f"expert {name!r} is being registered" if kind == "register" else "the bundle is being rebuilt"
        raise TransitionError(f"{what} by the job {other}; wait for it, or cancel it")


def _check_name_is_free(change: Change, name: str, build: str) -> None:
    aliased = change.connection.execute(
        select(tables.aliases.c.name).where(tables.aliases.c.alias == name)
    ).first()
    if aliased is not None:
        raise DuplicateExpertError(f"{name!r} is an alias; remove it first, or choose another name")
    named = change.connection.execute(
        select(tables.bundles.c.name).where(tables.bundles.c.build_id == build)
    ).scalar_one()
    if name == named:
        raise DuplicateExpertError(f"{name!r} is the bundle's name; choose another for the expert")


def by_key(change: Change, actor: Actor, key: str) -> Row[Any] | None:
    """The actor's job of this idempotency key; None where it is new.

    Raises:
        IdempotencyError: it cannot be kept.
    """
    if not storable(key):
        raise IdempotencyError(f"the idempotency key {key!r} cannot be kept; use printable characters")
    columns = tables.jobs.c
    found: Row[Any] | None = change.connection.execute(
        select(tables.jobs).where(columns.actor == plain(actor.name), columns.idempotency_key == key)
    ).one_or_none()
    return found
