"""Replicas as they report themselves; makes no revisions."""

from sqlalchemy import delete, insert, update

from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected, plain
from experts.registry.catalogue.rows import now
from experts.registry.records import Replica


class Replicas(Connected):
    """All raise CatalogueError where the database cannot be written."""

    def beat(self, replica: Replica) -> None:
        """What a replica says of itself, as often as it lives on."""
        values = {
            "beat": replica.beat,
            "revision": replica.revision,
            "build_id": replica.build_id,
            "url": plain(replica.url),
            "leases": list(replica.leases),
            "seen": now(),
        }
        with self._database.write() as connection:
            known = connection.execute(
                update(tables.replicas).where(tables.replicas.c.id == replica.id).values(values)
            )
            if not known.rowcount:
                connection.execute(insert(tables.replicas).values(id=replica.id, **values))

    def drop_replica(self, replica_id: str) -> None:
        """Forget a replica, with its leases and the blobs that it held."""
        with self._database.write() as connection:
            connection.execute(delete(tables.replicas).where(tables.replicas.c.id == replica_id))
            connection.execute(delete(tables.pins).where(tables.pins.c.holder == replica_id))
