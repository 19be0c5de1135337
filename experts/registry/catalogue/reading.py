"""What the catalogue knows. Every question is answered from one moment of the database."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Text, cast, select

from experts.errors import RecordNotFoundError, UnknownExpertError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import MAX_NUMBER, Connected, plain, storable
from experts.registry.catalogue.rows import (
    audit_of,
    bundle_of,
    dumps,
    expert_of,
    generation_of,
    job_of,
    replica_of,
    router_of,
)
from experts.registry.records import (
    Actor,
    AuditEntry,
    BundleRecord,
    Expert,
    Generation,
    Job,
    JobState,
    Replica,
    RouterGeneration,
    Snapshot,
)

_MAX_ROWS = 10_000

_LOOKED_AT = 100
"""Routers that know a generation, of which at most so many are looked at for one that knows the others' too."""


class Reading(Connected):
    """Questions; all raise CatalogueError where the database cannot be asked."""

    def revision(self) -> int:
        """How many changes were made; 0 before the first."""
        with self._database.read() as connection:
            return int(connection.execute(select(tables.registry.c.revision)).scalar_one())

    def snapshot(self) -> Snapshot | None:
        """What every replica shall serve; None before a bundle was adopted."""
        with self._database.read() as connection:
            return _snapshot(connection)

    def experts(self) -> list[Expert]:
        """All names that were ever given, retired ones too, by name."""
        rows = self._rows(select(tables.experts).order_by(tables.experts.c.name))
        return sorted((expert_of(row) for row in rows), key=lambda expert: expert.name)

    def expert(self, name: str) -> Expert:
        """One name, retired or not.

        Raises:
            UnknownExpertError: it was never given.
        """
        rows = (
            self._rows(select(tables.experts).where(tables.experts.c.name == name)) if storable(name) else []
        )
        if not rows:
            raise UnknownExpertError(f"there is no expert {name!r}")
        return expert_of(rows[0])

    def generations(self, name: str) -> list[Generation]:
        """All generations of a name, the newest first; none of a name that was never given."""
        if not storable(name):
            return []
        columns = tables.generations.c
        query = select(tables.generations).where(columns.name == name).order_by(columns.number.desc())
        return [generation_of(row) for row in self._rows(query)]

    def generation(self, name: str, number: int) -> Generation:
        """One generation.

        Raises:
            RecordNotFoundError: there is none.
        """
        columns = tables.generations.c
        rows = (
            self._rows(select(tables.generations).where(columns.name == name, columns.number == number))
            if storable(name) and 0 <= number < MAX_NUMBER
            else []
        )
        if not rows:
            raise RecordNotFoundError(f"expert {name!r} has no generation {number}")
        return generation_of(rows[0])

    def routers(self) -> list[RouterGeneration]:
        """All router generations of all bundles, the newest first; those given up have no files."""
        rows = self._rows(select(tables.routers).order_by(tables.routers.c.number.desc()))
        return [router_of(row) for row in rows]

    def router(self, number: int) -> RouterGeneration:
        """One router generation.

        Raises:
            RecordNotFoundError: there is none.
        """
        rows = (
            self._rows(select(tables.routers).where(tables.routers.c.number == number))
            if 0 <= number < MAX_NUMBER
            else []
        )
        if not rows:
            raise RecordNotFoundError(f"there is no router generation {number}")
        return router_of(rows[0])

    def router_with(self, name: str, number: int) -> int | None:
        """The router as it would be if only this expert's profile were that generation's: the newest such.

        Those of which files were given up do not count.

        Returns:
            None where there is none, or the current router does not know the expert.
        """
        routers, registry = tables.routers, tables.registry
        with self._database.read() as connection:
            current = connection.execute(
                select(routers.c.number, routers.c.build_id, routers.c.profiles).join(
                    registry, registry.c.router == routers.c.number
                )
            ).one_or_none()
            if current is None or name not in current.profiles or not 0 <= number < MAX_NUMBER:
                return None
            if current.profiles[name] == number:
                return int(current.number)
            query = (
                select(routers.c.number, routers.c.profiles)
                .where(
                    routers.c.build_id == current.build_id,
                    routers.c.profiles[name].as_integer() == number,
                    cast(routers.c.files, Text) != dumps({}),
                )
                .order_by(routers.c.number.desc())
                .limit(_LOOKED_AT)
            )
            wanted = {**current.profiles, name: number}
            found = (row.number for row in connection.execute(query) if row.profiles == wanted)
            return next(found, None)

    def bundles(self) -> list[BundleRecord]:
        """All bundles that ever served: the one that serves, those that could again, the last first, and others."""
        columns = tables.bundles.c
        rows = self._rows(select(tables.bundles).order_by(columns.created.desc(), columns.build_id))
        found = [bundle_of(row) for row in rows]
        return sorted(found, key=lambda bundle: (bundle.state != "active", -(bundle.left or 0)))

    def jobs(
        self,
        *,
        state: JobState | None = None,
        name: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Job]:
        """Jobs, the newest first.

        Args:
            state, name: only those.
            limit: at most so many.
            after: go on after the job of this id, to older ones.

        Raises:
            RecordNotFoundError: there is no job `after`.
        """
        if name is not None and not storable(name):
            return []
        columns = tables.jobs.c
        wanted: list[ColumnElement[bool]] = []
        if state is not None:
            wanted.append(columns.state == state)
        if name is not None:
            wanted.append(columns.name == name)
        with self._database.read() as connection:
            if after is not None:
                wanted.append(columns.turn < job_row(connection, after).turn)
            query = select(tables.jobs).where(*wanted).order_by(columns.turn.desc()).limit(_bounded(limit))
            return [job_of(row) for row in connection.execute(query)]

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            RecordNotFoundError: there is none.
        """
        with self._database.read() as connection:
            return job_of(job_row(connection, job_id))

    def job_of_key(self, actor: Actor, key: str) -> Job | None:
        """The job that an actor submitted under an idempotency key; None where there is none."""
        columns = tables.jobs.c
        wanted = columns.actor == plain(actor.name), columns.idempotency_key == key
        rows = self._rows(select(tables.jobs).where(*wanted)) if storable(key) else []
        return job_of(rows[0]) if rows else None

    def aliases(self) -> dict[str, str]:
        """Alias → expert."""
        with self._database.read() as connection:
            return _aliases(connection)

    def audit(
        self, limit: int = 100, before: int | None = None, target: str | None = None
    ) -> list[AuditEntry]:
        """The audit log, the newest first.

        Args:
            limit: at most so many.
            before: only entries of smaller ids.
            target: only of this expert, alias, bundle or job.
        """
        if target is not None and not storable(target):
            return []
        columns = tables.audit.c
        wanted: list[ColumnElement[bool]] = []
        if before is not None:
            wanted.append(columns.id < min(max(before, 0), MAX_NUMBER))
        if target is not None:
            wanted.append(columns.target == target)
        query = select(tables.audit).where(*wanted).order_by(columns.id.desc()).limit(_bounded(limit))
        return [audit_of(row) for row in self._rows(query)]

    def replicas(self) -> list[Replica]:
        """All replicas that reported themselves and were not dropped, by id."""
        rows = self._rows(select(tables.replicas).order_by(tables.replicas.c.id))
        return [replica_of(row) for row in rows]

    def _rows(self, query: Select[Any]) -> list[Row[Any]]:
        with self._database.read() as connection:
            return list(connection.execute(query))


def job_row(connection: Connection, job_id: str) -> Row[Any]:
    """The row of a job.

    Raises:
        RecordNotFoundError: there is none.
    """
    row: Row[Any] | None = None
    if storable(job_id):
        row = connection.execute(select(tables.jobs).where(tables.jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise RecordNotFoundError(f"there is no job {job_id!r}")
    return row


def _snapshot(connection: Connection) -> Snapshot | None:
    state = connection.execute(select(tables.registry)).one()
    if state.build_id is None:
        return None
    bundle = connection.execute(
        select(tables.bundles).where(tables.bundles.c.build_id == state.build_id)
    ).one()
    experts = [
        expert_of(row)
        for row in connection.execute(select(tables.experts).where(tables.experts.c.state == "active"))
    ]
    live, trials = tables.experts, tables.generations
    served = connection.execute(
        select(trials)
        .join(live, live.c.name == trials.c.name)
        .where(live.c.state == "active", trials.c.number == live.c.generation)
    )
    tried = tuple(expert.trial for expert in experts if expert.trial is not None)
    return Snapshot(
        revision=state.revision,
        bundle=bundle_of(bundle),
        experts={row.name: generation_of(row) for row in served},
        router=None if state.router is None else _router(connection, state.router),
        trials=tried,
        trial_generations=tuple(
            generation_of(
                connection.execute(
                    select(trials).where(trials.c.name == trial.name, trials.c.number == trial.generation)
                ).one()
            )
            for trial in tried
        ),
        trial_routers={
            number: _router(connection, number) for number in {trial.router for trial in tried} if number
        },
        aliases=_aliases(connection),
    )


def _router(connection: Connection, number: int) -> RouterGeneration:
    return router_of(
        connection.execute(select(tables.routers).where(tables.routers.c.number == number)).one()
    )


def _aliases(connection: Connection) -> dict[str, str]:
    rows = connection.execute(select(tables.aliases).order_by(tables.aliases.c.alias))
    return {row.alias: row.name for row in rows}


def _bounded(limit: int) -> int:
    return min(max(limit, 0), _MAX_ROWS)
