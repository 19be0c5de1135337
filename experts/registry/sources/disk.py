"""What uploads and downloads ask of the disk: locks between processes, syncing, errors by their meaning."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from experts.errors import BlobError, StorageFullError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


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
        if error.errno in _NO_ROOM:
            raise StorageFullError(f"there is no room left below {where.name}; make some") from error
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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
