"""What a place is that files are fetched from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from experts.registry.sources.policy import Location


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file that is there.

    Attributes:
        nbytes: as announced; None where nobody says.
        chunks: its bytes, once.
    """

    nbytes: int | None
    chunks: Iterator[bytes]


class Remote(Protocol):
    """A place."""

    def open(self, location: Location) -> AbstractContextManager[RemoteFile | None]:
        """One file; None where there is none.

        Raises:
            SourceError, SourceUnavailableError: it is refused, or does not answer.
        """

    def close(self) -> None:
        """Let go of it."""
