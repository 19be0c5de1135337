"""A file that grows chunk by chunk; each secured part counts, whatever happens to the rest."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from experts.registry.sources.disk import disk

_SYNC_BYTES = 64 * 2**20
"""Secured at least that often, so that a crash in a long upload loses little."""


class FileWriter:
    """Writes at the end of an open file.

    Args:
        file: unbuffered.
        where: named in errors.
        end: where it ends.
        take: asked before each chunk whether that many bytes may still come.
        secured: told, once bytes are synced, where the file ends and how many they were.
    """

    def __init__(
        self,
        file: BinaryIO,
        where: Path,
        end: int,
        take: Callable[[int], None],
        secured: Callable[[int, int], None],
    ) -> None:
        self._file = file
        self._where = where
        self._end = end
        self._take = take
        self._told = secured
        self._unsecured = 0
        self._reserved = 0

    @property
    def end(self) -> int:
        """Where the file ends, what is not secured yet included."""
        return self._end

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            SourceTooLargeError: more than may come.
            StorageFullError, BlobError: the disk refuses.
        """
        self._take(len(chunk))
        self._reserved += len(chunk)
        left = memoryview(chunk)
        with disk(self._where):
            while left:
                written = self._file.write(left) or 0
                self._end += written
                self._unsecured += written
                left = left[written:]
        if self._unsecured >= _SYNC_BYTES:
            self._secure()

    def _secure(self) -> None:
        with disk(self._where):
            os.fsync(self._file.fileno())
        self._told(self._end, self._reserved)
        self._unsecured = self._reserved = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._secure()
