"""One database, SQLite or PostgreSQL: how it is opened, how transactions begin, what its faults become."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from experts.errors import CatalogueError, CatalogueFullError
from experts.registry.catalogue.rows import dumps

Dialect = Literal["sqlite", "postgresql"]
CHANNEL = "twinserve_registry"
"""Where PostgreSQL tells of new revisions."""

_DISK_FULL = "53100"
"""PostgreSQL's word for it."""

_CONNECT_SECONDS = 5
_STATEMENT_SECONDS = 15
_POOL_SECONDS = 15.0


class Database:
    """Connections to one database; safe to use from many threads.

    Attributes:
        dialect: which of the two it is.
        where: its URL without the password, for messages.
        url: its URL.
        writable: whether it may be written, as far as could be told when it was opened.
    """

    def __init__(self, url: URL, engine: Engine, writable: bool) -> None:
        self.url = url
        self.where = url.render_as_string(hide_password=True)
        self.dialect: Dialect = "sqlite" if engine.dialect.name == "sqlite" else "postgresql"
        self.writable = writable
        self._engine = engine
        self._closed = False

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> "Database":
        """Check that it is there, or can be made there.

        A database that this process cannot write, since its disk, its folder or its rights do not allow it, is
        opened for reading; so is any with `read_only`. An SQLite file on a disk that cannot be written is taken
        to be left alone by everyone else.

        Raises:
            CatalogueError: the URL is of no database that is known, or nothing usable is there.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            return _open_sqlite(parsed, read_only)
        return _open_postgresql(parsed, read_only)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment of the database.

        Raises:
            CatalogueError: it cannot be reached or read.
        """
        options: dict[str, Any] = (
            {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
            if self.dialect == "postgresql"
            else {}
        )
        with self._connected(options) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; committed when left without an exception.

        On SQLite it holds the only write lock from its beginning.

        Raises:
            CatalogueError: it cannot be reached or written; nothing was, unless the connection broke while the
                end was being told.
        """
        if not self.writable:
            raise CatalogueError(
                f"the catalogue {self.where} is open for reading only; make its database writable and restart"
            )
        with self._connected({"twinserve_write": True}) as connection:
            yield connection

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """PostgreSQL alone: psycopg's own connection, outside the pool, that hears of new revisions.

        Raises:
            CatalogueError: it cannot be reached.
        """
        with self._faults():
            connection = self._engine.connect()
            try:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(text(f"LISTEN {CHANNEL}"))
                yield connection.connection.driver_connection
            finally:
                # It heard the channel; nobody else shall have it.
                connection.detach()
                connection.close()

    def close(self) -> None:
        """Close all connections; nothing works afterwards."""
        self._closed = True
        self._engine.dispose()

    @contextmanager
    def _connected(self, options: dict[str, Any]) -> Iterator[Connection]:
        with self._faults(), self._engine.connect() as connection:
            connection = connection.execution_options(**options)
            with connection.begin():
                yield connection

    @contextmanager
    def _faults(self) -> Iterator[None]:
        if self._closed:
            raise CatalogueError(f"the catalogue {self.where} is closed")
        try:
            yield
        except SQLAlchemyError as error:
            message = f"the catalogue {self.where} cannot be used: {_said(error)}"
            if _is_full(error):
                raise CatalogueFullError(f"{message}; make room on its disk") from error
            raise CatalogueError(message) from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise CatalogueError(
            "the catalogue's URL cannot be read; write it as sqlite:////folder/catalogue.sqlite or "
            "postgresql://user@host/database"
        ) from error
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise CatalogueError(f"the catalogue cannot lie in {backend!r}; use sqlite:// or postgresql://")
    if parsed.database in (None, "", ":memory:"):
        raise CatalogueError(
            "the catalogue needs a file; write its URL as sqlite:////folder/catalogue.sqlite"
        )
    return parsed


def _open_sqlite(url: URL, read_only: bool) -> Database:
    path = Path(str(url.database)).absolute()
    exists = path.exists()
    if read_only and not exists:
        raise CatalogueError(f"the catalogue {path} is not there; nothing can be read")
    if not exists and not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogueError(f"the catalogue's folder {path.parent} cannot be made: {error}") from error
    # Its journal lies beside it, so that the folder counts too.
    allowed = os.access(path.parent, os.W_OK) and (not exists or os.access(path, os.W_OK))
    if not exists and not allowed:
        raise CatalogueError(f"the catalogue {path} cannot be made: its folder may not be written")
    writable = allowed and not read_only
    engine = _sqlite_engine(path, mode="rwc" if writable else "ro", wal=writable)
    database = Database(url, engine, writable)
    try:
        with database.read() as connection:
            connection.execute(text("SELECT count(*) FROM sqlite_master"))
    except CatalogueError:
        journal = path.with_name(f"{path.name}-wal")
        if writable or allowed or (journal.exists() and journal.stat().st_size):
            engine.dispose()
            raise
        # Reading a write-ahead log needs a file beside it that cannot be made here, and there is no log.
        engine.dispose()
        database = Database(url, _sqlite_engine(path, mode="ro&immutable=1", wal=False), writable=False)
        with database.read() as connection:
            connection.execute(text("SELECT count(*) FROM sqlite_master"))
    return database


def _sqlite_engine(path: Path, mode: str, wal: bool) -> Engine:
    engine = create_engine(
        f"sqlite:///{path.as_uri()}?mode={mode}&uri=true",
        connect_args={"timeout": _STATEMENT_SECONDS, "check_same_thread": False},
        json_serializer=dumps,
        pool_timeout=_POOL_SECONDS,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Transactions are begun below: the driver would begin them too late and in the wrong mode.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={_STATEMENT_SECONDS * 1000}")
        if wal:
            cursor.execute("PRAGMA journal_mode=WAL")
            # In WAL mode NORMAL could lose the last commits when the power fails.
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("twinserve_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _open_postgresql(url: URL, read_only: bool) -> Database:
    milliseconds = _STATEMENT_SECONDS * 1000
    settings = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        "idle_in_transaction_session_timeout": 2 * milliseconds,
    }
    try:
        engine = create_engine(
            url,
            pool_pre_ping=True,
            pool_timeout=_POOL_SECONDS,
            json_serializer=dumps,
            connect_args={
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": "twinserve",
                # Of a peer that is gone without a word.
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": milliseconds,
                "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
            },
        )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise CatalogueError(
            "a catalogue in PostgreSQL needs psycopg; install twinserve with the extra `postgres`"
        ) from error
    database = Database(url, engine, writable=True)
    try:
        with database.read() as connection:
            standby = connection.execute(text("SELECT pg_is_in_recovery()")).scalar_one()
            table = connection.execute(text("SELECT to_regclass('registry') IS NOT NULL")).scalar_one()
            may = (
                not table
                or connection.execute(text("SELECT has_table_privilege('registry', 'UPDATE')")).scalar_one()
            )
    except CatalogueError:
        engine.dispose()
        raise
    database.writable = not read_only and not standby and bool(may)
    return database


def _is_full(error: SQLAlchemyError) -> bool:
    """Whether the database says that its disk has no room."""
    origin = getattr(error, "orig", None)
    told = getattr(origin, "sqlite_errorcode", None) or getattr(origin, "sqlstate", None)
    return told in (sqlite3.SQLITE_FULL, _DISK_FULL)


def _said(error: SQLAlchemyError) -> str:
    """What the database said, on one line; never a statement's values."""
    origin = getattr(error, "orig", None) or error
    lines = str(origin).strip().splitlines()
    return lines[0] if lines else type(origin).__name__
