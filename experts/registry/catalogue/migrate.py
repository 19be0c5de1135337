"""Brings a catalogue's schema to this program's version."""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from experts.errors import CatalogueError
from experts.registry.catalogue.database import Database

_LOCK = 0x7477696E
"""PostgreSQL's advisory lock that one migration holds."""


def migrate(database: Database) -> None:
    """Run the migrations that the database lacks, all in one transaction; none, if it is as new as this program.

    Raises:
        CatalogueError: its schema is of a newer program, or old and not to be written.
    """
    script = ScriptDirectory.from_config(_config())
    head = script.get_current_head()
    with database.read() as connection:
        found = _version(connection)
    if found == head:
        return
    known = {revision.revision for revision in script.walk_revisions()}
    if found is not None and found not in known:
        raise CatalogueError(
            f"the catalogue {database.where} is of version {found!r}, which a newer program made; "
            "run that one, or another catalogue"
        )
    if not database.writable:
        raise CatalogueError(
            f"the catalogue {database.where} is of version {found!r}, this program reads {head!r}, and it may not "
            "be written; open it once where it may be"
        )
    with database.write() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        # Another process may have been here first.
        if _version(connection) != head:
            config = _config()
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise CatalogueError(f"the catalogue {database.where} cannot be migrated: {error}") from error


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "experts.registry.catalogue:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
