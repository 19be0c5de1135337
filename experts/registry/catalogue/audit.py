"""The audit log's entries that no change writes: refused ones."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected, write_audit
from experts.registry.records import Actor


class Audit(Connected):
    """What admins tried."""

    def record(
        self,
        actor: Actor,
        action: str,
        target: str,
        result: str,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Remember a change that was refused; makes no revision.

        Raises:
            CatalogueError: the database cannot be written.
        """
        with self._database.write() as connection:
            revision = connection.execute(select(tables.registry.c.revision)).scalar_one()
            write_audit(connection, actor, action, target, result, revision, detail or {})
