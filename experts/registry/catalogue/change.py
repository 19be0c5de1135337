"""One change of the registry: a transaction that checks, writes, counts the revision up and tells of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, text, update

from experts.errors import RecordNotFoundError, TransitionError, UnknownExpertError
from experts.registry.catalogue import tables
from experts.registry.catalogue.database import CHANNEL, Database
from experts.registry.catalogue.rows import now
from experts.registry.records import Actor

_TARGET = 128
"""Characters of an audited change's target; names of experts, jobs, aliases and bundles are shorter."""

MAX_NUMBER = 2**53
"""Numbers beyond this were never given out; no database is asked for them."""


class Change:
    """What one write transaction does to the registry.

    Writers wait for one another before they look at anything, so whatever one reads here holds until it is done.

    Attributes:
        connection: inside the transaction.
        revision: the one that this change makes, if it changes anything.
        build_id: of the bundle that is served; None before one was adopted. May be set.
        router: the current router generation; None where there is none. May be set.
    """

    def __init__(self, connection: Connection, dialect: str) -> None:
        row = connection.execute(select(tables.registry).with_for_update()).one()
        self.connection = connection
        self.revision: int = row.revision + 1
        self.build_id: str | None = row.build_id
        self.router: int | None = row.router
        self._dialect = dialect
        self._noted = False

    def note(
        self,
        actor: Actor,
        action: str,
        target: str,
        detail: Mapping[str, Any] | None = None,
        result: str = "ok",
    ) -> None:
        """This is a change, with its line in the audit log."""
        self._noted = True
        write_audit(self.connection, actor, action, target, result, self.revision, detail or {})

    def finish(self) -> None:
        """Count the revision up if anything was changed, and tell whoever listens once it is committed."""
        if not self._noted:
            return
        self.connection.execute(
            update(tables.registry).values(revision=self.revision, build_id=self.build_id, router=self.router)
        )
        if self._dialect == "postgresql":
            self.connection.execute(
                text("SELECT pg_notify(:channel, :revision)"),
                {"channel": CHANNEL, "revision": str(self.revision)},
            )

    # -- what changes look at -----------------------------------------------------------------------

    def served_build(self) -> str:
        """The bundle that is served.

        Raises:
            TransitionError: none was adopted yet.
        """
        if self.build_id is None:
            raise TransitionError("the catalogue has no bundle yet; start a server on one first")
        return self.build_id

    def expert_row(self, name: str) -> Row[Any] | None:
        """The row of an expert, whatever its state."""
        if not storable(name):
            return None
        found: Row[Any] | None = self.connection.execute(
            select(tables.experts).where(tables.experts.c.name == name)
        ).one_or_none()
        return found

    def known_expert(self, name: str) -> Row[Any]:
        """The row of an expert that has had a generation, retired or not.

        Raises:
            UnknownExpertError: there is none.
        """
        row = self.expert_row(name)
        if row is None or (row.generation is None and row.trial is None and not self._ever_ready(name)):
            raise UnknownExpertError(f"there is no expert {name!r}")
        return row

    def served_expert(self, name: str) -> Row[Any]:
        """The row of an expert that was not retired.

        Raises:
            UnknownExpertError: there is none.
        """
        row = self.known_expert(name)
        if row.state == "retired":
            raise UnknownExpertError(f"there is no expert {name!r}; it was retired")
        return row

    def generation_row(self, name: str, number: int) -> Row[Any]:
        """The row of a generation.

        Raises:
            RecordNotFoundError: there is none.
        """
        columns = tables.generations.c
        row: Row[Any] | None = None
        if storable(name) and 0 <= number < MAX_NUMBER:
            row = self.connection.execute(
                select(tables.generations).where(columns.name == name, columns.number == number)
            ).one_or_none()
        if row is None:
            raise RecordNotFoundError(f"expert {name!r} has no generation {number}")
        return row

    def usable_generation(self, name: str, number: int) -> Row[Any]:
        """The row of a generation that the served bundle can serve.

        Raises:
            RecordNotFoundError: there is none.
            TransitionError: it is not ready, or belongs to another bundle.
        """
        row = self.generation_row(name, number)
        if row.state != "ready":
            raise TransitionError(
                f"generation {number} of {name!r} is {row.state}; only a ready one can serve"
            )
        if row.build_id != self.build_id:
            raise TransitionError(
                f"generation {number} of {name!r} was made for another shared expert, the bundle {row.build_id}; "
                "register it again"
            )
        return row

    def router_row(self, number: int) -> Row[Any]:
        """The row of a router generation of the served bundle.

        Raises:
            RecordNotFoundError: there is none.
            TransitionError: it belongs to another bundle, or its files were given up.
        """
        row: Row[Any] | None = None
        if 0 <= number < MAX_NUMBER:
            row = self.connection.execute(
                select(tables.routers).where(tables.routers.c.number == number)
            ).one_or_none()
        if row is None:
            raise RecordNotFoundError(f"there is no router generation {number}")
        if row.build_id != self.build_id:
            raise TransitionError(f"router generation {number} belongs to another bundle, {row.build_id}")
        if not row.files:
            raise TransitionError(f"router generation {number} was given up by garbage collection")
        return row

    def left(self, name: str, number: int | None) -> None:
        """Remember that a generation serves no more from this revision on."""
        columns = tables.generations.c
        self.connection.execute(
            update(tables.generations)
            .where(columns.name == name, columns.number == number)
            .values(left_at=self.revision)
        )

    def set_expert(self, name: str, **values: Any) -> None:
        """Write columns of an expert."""
        self.connection.execute(
            update(tables.experts).where(tables.experts.c.name == name).values(updated=now(), **values)
        )

    def _ever_ready(self, name: str) -> bool:
        columns = tables.generations.c
        count = self.connection.execute(
            select(func.count())
            .select_from(tables.generations)
            .where(columns.name == name, columns.state.in_(("ready", "collected")))
        ).scalar_one()
        return bool(count)


class Connected:
    """What all parts of the catalogue share: its database, and how it is changed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def _change(self) -> Iterator[Change]:
        """A change; nothing of it is kept if an exception leaves.

        Raises:
            CatalogueError: the database cannot be written.
        """
        with self._database.write() as connection:
            change = Change(connection, self._database.dialect)
            yield change
            change.finish()


def write_audit(
    connection: Connection,
    actor: Actor,
    action: str,
    target: str,
    result: str,
    revision: int,
    detail: Mapping[str, Any],
) -> None:
    """One line of the audit log."""
    connection.execute(
        insert(tables.audit).values(
            at=now(),
            actor=plain(actor.name),
            address=plain(actor.address),
            action=plain(action)[:64],
            # Indexed, and PostgreSQL takes no index entry of a few thousand bytes.
            target=plain(target)[:_TARGET],
            result=plain(result),
            revision=revision,
            detail=dict(detail),
        )
    )


def storable(value: str) -> bool:
    """Whether a database can hold this text; what cannot be held is not there."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def plain(value: str) -> str:
    """A text with what no database holds replaced."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
