"""Which rows nobody needs any more: of work that ended long ago, old lines of the audit log, things given up."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Literal

from sqlalchemy import ColumnElement, Connection, Delete, Text, cast, delete, exists, or_, select, tuple_

from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected
from experts.registry.catalogue.ending import OPEN
from experts.registry.records import ENDED, Actor, Pruned

_AT_ONCE = 2000
"""Rows of a kind that go in one transaction, for which all other changes wait."""

_ACTION = "prune"
_EVER_READY = ("ready", "collected")


class Pruning(Connected):
    """History that goes; raises CatalogueError where the database cannot be used."""

    def prune(self, jobs_before: datetime | None, audit_before: datetime | None, actor: Actor) -> Pruned:
        """Remove old rows, so many at a time; called again until none went, all of them.

        Ended jobs go, and their idempotency keys with them; so do generations that failed or were collected, and
        routers without files. What serves, could serve or is still referred to stays, and whatever tells what was:
        the numbers that were given out, that a name was an expert's, and the newest line of the audit log. That
        something went is a change, with one line of its own.

        Rows are as old as the clocks said that wrote them. Where the newest line of the audit log is past a limit
        itself, a clock has jumped, or nobody has changed anything since: then nothing goes by that limit. Beyond
        that a clock that is far ahead costs the history of ended jobs, and the audit log's; nothing that serves or
        could, nothing that waits or runs, and no number.

        Args:
            jobs_before: jobs that ended before, generations and routers that were made before; None keeps all.
            audit_before: lines of the audit log that were written before; None keeps all.
            actor: who asks.
        """
        with self._database.read() as connection:
            # Most looks find nothing, and need no lock to see it.
            if not any(old.rows for old in _old(connection, jobs_before, audit_before)):
                return Pruned()
        with self._change() as change:
            gone = Pruned()
            for old in _old(change.connection, jobs_before, audit_before):
                if old.rows:
                    change.connection.execute(old.delete)
                    gone += Pruned(**{old.kind: old.rows})
            if gone.rows:
                change.note(actor, _ACTION, "registry", asdict(gone))
            return gone


@dataclass(frozen=True, slots=True)
class _Old:
    """Rows of one kind that can go together.

    Attributes:
        rows: how many.
        delete: the statement that removes them.
    """

    kind: Literal["jobs", "generations", "routers", "audit"]
    rows: int
    delete: Delete


@dataclass(frozen=True, slots=True)
class _Needed:
    """What the catalogue refers to in columns that no foreign key guards.

    Attributes:
        generations: by trials and ways back.
        routers: the current one, and those of trials and ways back.
    """

    generations: set[tuple[str, int]] = field(default_factory=set)
    routers: set[int] = field(default_factory=set)


def _old(
    connection: Connection, jobs_before: datetime | None, audit_before: datetime | None
) -> Iterator[_Old]:
    """Each kind is looked for when it is asked for: jobs that are removed by then refer to no generation."""
    columns = tables.audit.c
    newest = connection.execute(
        select(columns.id, columns.at).order_by(columns.id.desc()).limit(1)
    ).one_or_none()
    if newest is None:
        return
    some = False
    if jobs_before is not None and newest.at >= jobs_before:
        for old in _old_work(connection, jobs_before):
            some = some or old.rows > 0
            yield old
    if audit_before is not None and newest.at >= audit_before:
        lines = _old_lines(connection, audit_before, newest.id, alone=not some)
        yield _Old("audit", len(lines), delete(tables.audit).where(columns.id.in_(lines)))


def _old_work(connection: Connection, before: datetime) -> Iterator[_Old]:
    columns, generations = tables.jobs.c, tables.generations.c
    jobs = connection.execute(
        select(columns.id)
        .where(columns.state.in_(sorted(ENDED)), columns.ended < before)
        .order_by(columns.turn)
        .limit(_AT_ONCE)
    )
    ids = list(jobs.scalars())
    yield _Old("jobs", len(ids), delete(tables.jobs).where(columns.id.in_(ids)))
    needed = _needed(connection)
    pairs = _old_generations(connection, before, needed)
    key = tuple_(generations.name, generations.number)
    yield _Old("generations", len(pairs), delete(tables.generations).where(key.in_(pairs)))
    numbers = _old_routers(connection, before, needed)
    yield _Old("routers", len(numbers), delete(tables.routers).where(tables.routers.c.number.in_(numbers)))


def _old_lines(connection: Connection, before: datetime, newest: int, *, alone: bool) -> list[int]:
    """Without the newest: numbers of lines ascend because it is there. Lines of prunes are no reason for another."""
    columns = tables.audit.c
    old = columns.at < before, columns.id < newest
    other = select(columns.id).where(*old, columns.action != _ACTION).limit(1)
    if alone and connection.execute(other).first() is None:
        return []
    return list(
        connection.execute(select(columns.id).where(*old).order_by(columns.id).limit(_AT_ONCE)).scalars()
    )


def _old_generations(connection: Connection, before: datetime, needed: _Needed) -> list[tuple[str, int]]:
    """Failed or collected ones that neither an expert, a job nor a router that could serve refers to.

    Of those of a name that were ready once the newest stays: by it one knows that the name was an expert's.
    """
    columns, experts, jobs = tables.generations.c, tables.experts.c, tables.jobs.c
    other = tables.generations.alias()
    newer = exists().where(
        other.c.name == columns.name, other.c.number > columns.number, other.c.state.in_(_EVER_READY)
    )
    job = exists().where(
        jobs.name == columns.name,
        or_(jobs.generation == columns.number, jobs.state.in_(OPEN)),
    )
    rows = connection.execute(
        select(columns.name, columns.number)
        .join(tables.experts, experts.name == columns.name)
        .where(
            columns.state.in_(("failed", "collected")),
            columns.created < before,
            experts.generation.is_distinct_from(columns.number),
            or_(columns.state == "failed", newer),
            ~job,
        )
        .order_by(columns.name, columns.number)
    )
    found = [(row.name, row.number) for row in rows]
    if found:
        profiled = _profiled(connection, needed.routers)
        found = [each for each in found if each not in needed.generations and each not in profiled]
    return found[:_AT_ONCE]


def _old_routers(connection: Connection, before: datetime, needed: _Needed) -> list[int]:
    """Without the newest: the next one's number is the highest that is there, and 1."""
    columns = tables.routers.c
    newer = tables.routers.alias()
    rows = connection.execute(
        select(columns.number)
        .where(_given_up(), columns.created < before, exists().where(newer.c.number > columns.number))
        .order_by(columns.number)
    ).scalars()
    return [number for number in rows if number not in needed.routers][:_AT_ONCE]


def _given_up() -> ColumnElement[bool]:
    """Routers without files. As text, for PostgreSQL compares no JSON."""
    return cast(tables.routers.c.files, Text) == "{}"


def _profiled(connection: Connection, routers: set[int]) -> set[tuple[str, int]]:
    """Generations whose profiles a router has that serves or could."""
    columns = tables.routers.c
    rows = connection.execute(select(columns.profiles).where(or_(~_given_up(), columns.number.in_(routers))))
    return {pair for profiles in rows.scalars() for pair in profiles.items()}


def _needed(connection: Connection) -> _Needed:
    needed = _Needed()
    experts, bundles = tables.experts.c, tables.bundles.c
    routers = [connection.execute(select(tables.registry.c.router)).scalar_one()]
    tried = select(experts.name, experts.trial).where(experts.trial.is_not(None))
    for name, trial in connection.execute(tried):
        needed.generations.add((name, trial["generation"]))
        routers.append(trial["router"])
    ways = select(bundles.way_back).where(bundles.way_back.is_not(None))
    for way in connection.execute(ways).scalars():
        needed.generations.update(way["experts"].items())
        routers.append(way["router"])
    needed.routers.update(number for number in routers if number is not None)
    return needed
