"""Local files of the blob store: hashed durable copies, and digests that were verified before."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from experts.bundle_files import NO_ROOM, sync
from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError, MissingBlobError, StorageFullError

_CHUNK = 2**20
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_REMEMBERED = 65_536


@dataclass(frozen=True, slots=True)
class Hashed:
    """A local file that nobody changes any more.

    Attributes:
        md5: in hexadecimal digits; what object stores tell of an upload.
    """

    path: Path
    entry: FileEntry
    md5: str


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """The system's refusals as ours; `what` begins the message.

    Raises:
        StorageFullError: no room, no quota, or a file larger than allowed.
        BlobError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFullError(
                f"{what}: there is no room ({error.strerror}); make some, for instance with "
                "`twinserve registry gc`, and try again"
            ) from error
        raise BlobError(f"{what}: {error}") from error


def hashed_copy(source: Path | bytes, folder: Path) -> Hashed:
    """Copy into a new read-only file in `folder`, flushed to the disk, and tell its digests.

    Raises:
        StorageFullError, BlobError: it cannot be read or written; nothing of it is left.
    """
    scratch = folder / secrets.token_hex(16)
    with refusals(f"cannot store {'bytes' if isinstance(source, bytes) else source} in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _opened(source) as reader, scratch.open("xb") as writer:
                sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
                while chunk := reader.read(_CHUNK):
                    sha256.update(chunk)
                    md5.update(chunk)
                    size += len(chunk)
                    writer.write(chunk)
                writer.flush()
                os.fchmod(writer.fileno(), 0o444)
                os.fsync(writer.fileno())
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    return Hashed(scratch, FileEntry(sha256=sha256.hexdigest(), nbytes=size), md5.hexdigest())


def _opened(source: Path | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def make_folder(path: Path, root: Path) -> None:
    """Make a folder and those above it up to `root`, durably."""
    if path.is_dir():
        return
    if path != root:
        make_folder(path.parent, root)
    path.mkdir(parents=path == root, exist_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def lock(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock file, together with others or alone; freed when the process ends, however it ends.

    Where this process may write nothing it holds nothing.
    """
    with refusals(f"cannot lock {path}"), contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in _FORBIDDEN:
                raise
        else:
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        held = held.pop_all()
    with held:
        yield


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError:
        return False
    return True


class Verified:
    """Digests of local files, each read once as long as inode, time of change and size stay the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int, int, int], str] = OrderedDict()

    def check(self, path: Path, entry: FileEntry, *, again: bool = False) -> None:
        """Raise unless the file is what it should be; `again` reads it whatever was read before.

        Raises:
            MissingBlobError: there is no file.
            CorruptBlobError: a link, no plain file, or other content.
            BlobError: it cannot be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingBlobError(
                f"{path} is not there; `twinserve registry verify` tells what needs it"
            ) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CorruptBlobError(
                    f"{path} is a symbolic link; the blob store holds plain files only"
                ) from error
            raise BlobError(f"{path}: {error}") from error
        with open(descriptor, "rb") as file, refusals(f"cannot read {path}"):
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise CorruptBlobError(f"{path} is no plain file")
            if about.st_size != entry.nbytes:
                raise CorruptBlobError(f"{path} has {about.st_size} bytes instead of {entry.nbytes}; {_MEND}")
            key = _key(about)
            found = None if again else self._recall(key)
            if found is None:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if _key(os.fstat(descriptor)) == key:
                    self._remember(key, found)
        if found != entry.sha256:
            raise CorruptBlobError(f"{path} has the digest {found} instead of {entry.sha256}; {_MEND}")

    def trust(self, path: Path, sha256: str) -> None:
        """Remember a digest that was computed while the file was written, and that nobody can have changed."""
        self._remember(_key(path.stat()), sha256)

    def _recall(self, key: tuple[int, int, int, int]) -> str | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, key: tuple[int, int, int, int], sha256: str) -> None:
        with self._lock:
            self._known[key] = sha256
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


_MEND = "`twinserve registry verify --repair` mends it where another copy is left"


def _key(about: os.stat_result) -> tuple[int, int, int, int]:
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size
