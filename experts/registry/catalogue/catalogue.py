"""The catalogue: all questions and changes over one database."""

from experts.registry.catalogue.audit import Audit
from experts.registry.catalogue.bundles import Bundles
from experts.registry.catalogue.collecting import Collecting
from experts.registry.catalogue.database import Database, Dialect
from experts.registry.catalogue.experts import ExpertChanges
from experts.registry.catalogue.jobs import Jobs
from experts.registry.catalogue.mending import Mending
from experts.registry.catalogue.migrate import migrate
from experts.registry.catalogue.pruning import Pruning
from experts.registry.catalogue.publishing import Publishing
from experts.registry.catalogue.reading import Reading
from experts.registry.catalogue.replicas import Replicas
from experts.registry.catalogue.watch import Watching


class Catalogue(
    Reading, ExpertChanges, Jobs, Publishing, Bundles, Replicas, Collecting, Pruning, Audit, Watching, Mending
):
    """What the registry knows, in SQLite or PostgreSQL; for many threads, processes and machines at once.

    Every change is one transaction that advances the revision by 1 and has its lines in the audit log; of what is
    refused nothing is kept. Reports (progress, beats, pins of blobs) and refused changes that are recorded make no
    revision. Clocks are read for people only, and `prune` believes what they said.
    """

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> "Catalogue":
        """Open a catalogue, made or brought to this program's version where that is needed.

        A database that this process may not write (its rights, a read-only disk or folder, a standby) is opened for
        reading: `writable` is False, questions are answered and changes raise CatalogueError. One that is not there
        or of an older version must be writable.

        Args:
            url: `sqlite:////folder/catalogue.sqlite` or `postgresql://user:password@host/database`.
            read_only: open it for reading whatever it allows.

        Raises:
            CatalogueError: there is no usable database, or it is of a newer program.
        """
        database = Database.open(url, read_only=read_only)
        try:
            migrate(database)
        except BaseException:
            database.close()
            raise
        return cls(database)

    @property
    def dialect(self) -> Dialect:
        """Which database it is."""
        return self._database.dialect

    @property
    def writable(self) -> bool:
        """Whether it can be changed through this object."""
        return self._database.writable

    @property
    def where(self) -> str:
        """Its URL without the password."""
        return self._database.where

    def close(self) -> None:
        """Close all connections; nothing works afterwards."""
        self._database.close()
