"""What uploads and downloads ask of the disk: locks between processes, errors by their meaning."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from experts.bundle_files import NO_ROOM
from experts.errors import BlobError, StorageFullError


@contextlib.contextmanager
def disk(where: Path) -> Iterator[None]:
    """Raise what the disk refuses as ours.

    Raises:
        StorageFullError: no room.
        BlobError: read-only, broken, no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFullError(
                f"there is no room left below {where.name}; make some, for instance with `twinserve registry gc`, "
                "and try again"
            ) from error
        raise BlobError(f"{where} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, against threads and processes; waits for it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(file: BinaryIO) -> bool:
    """Take an open file for oneself until it is closed; false where somebody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
