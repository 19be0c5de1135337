"""How a replica learns of new revisions: PostgreSQL tells, SQLite is asked."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select

from experts.errors import CatalogueError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected

_log = logging.getLogger(__name__)

_STOP_SECONDS = 0.25
"""How long a listener may not notice that it shall stop."""


class Watching(Connected):
    """Revisions as they come."""

    def watch(self, stop: threading.Event, poll_seconds: float) -> Iterator[int]:
        """The current revision, then every newer one soon after it was made; some may be skipped.

        A database that cannot be reached is asked again until it can be. Ends when `stop` is set.

        Args:
            poll_seconds: how often it is asked, listened to or not.
        """
        last: int | None = None
        reached = True
        while not stop.is_set():
            try:
                for revision in self._revisions(stop, poll_seconds):
                    reached = True
                    if revision != last:
                        last = revision
                        yield revision
            except CatalogueError as error:
                if reached:
                    _log.warning("revisions cannot be followed: %s", error)
                reached = False
                stop.wait(poll_seconds)

    def _revisions(self, stop: threading.Event, poll_seconds: float) -> Iterator[int]:
        if self._database.dialect == "sqlite" or not self._database.writable:
            while not stop.is_set():
                yield self._ask()
                stop.wait(poll_seconds)
            return
        with self._database.listening() as connection:
            # What was made before it listened is not told.
            yield self._ask()
            asked = time.monotonic()
            while not stop.is_set():
                for told in self._heard(connection, min(poll_seconds, _STOP_SECONDS)):
                    yield int(told.payload)
                if time.monotonic() - asked >= poll_seconds:
                    yield self._ask()
                    asked = time.monotonic()

    @staticmethod
    def _heard(connection: Any, seconds: float) -> list[Any]:
        # Imported where a PostgreSQL connection exists, hence the driver; SQLite needs none.
        import psycopg

        try:
            return list(connection.notifies(timeout=seconds, stop_after=1))
        except psycopg.Error as error:
            raise CatalogueError(f"the catalogue's connection broke: {error}") from error

    def _ask(self) -> int:
        with self._database.read() as connection:
            return int(connection.execute(select(tables.registry.c.revision)).scalar_one())
