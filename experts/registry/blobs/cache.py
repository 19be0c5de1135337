"""A local folder of verified copies and of folders made of them, kept below a size."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError, MissingBlobError
from experts.registry.blobs.files import Verified, refusals
from experts.registry.blobs.store import relative_path

_UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES})
_IN_USE_SECONDS = 600.0
"""Nothing that was asked for so recently is removed: its reader may not have opened it yet."""


@dataclass(frozen=True)
class _Item:
    """A copy, or a folder.

    Attributes:
        used: when it was last asked for, seconds since 1970.
        inodes: inode → bytes and links, of its files.
    """

    path: Path
    used: float
    inodes: Mapping[int, tuple[int, int]]


class Cache:
    """Copies of blobs under `sha256/`, folders of hard links under `folders/`; safe to remove at any time.

    Args:
        limit: bytes of what only the cache holds; the least recently used go first.
    """

    def __init__(self, root: Path, verified: Verified, limit: int) -> None:
        self.root = root
        self.scratch = root / "incoming"
        self._folders = root / "folders"
        self._verified = verified
        self._limit = limit

    def find(self, entry: FileEntry) -> Path | None:
        """The verified copy; a corrupt one is removed."""
        path = self.root / relative_path(entry.sha256)
        try:
            self._verified.check(path, entry)
        except MissingBlobError:
            return None
        except CorruptBlobError:
            with refusals(f"cannot remove the corrupt copy {path}"):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            about = path.stat()
            os.utime(path, ns=(time.time_ns(), about.st_mtime_ns))
        return path

    def take(self, scratch: Path, entry: FileEntry) -> Path:
        """Make a local file, whose digest was verified, the copy."""
        path = self.root / relative_path(entry.sha256)
        with refusals(f"cannot keep {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._verified.trust(scratch, entry.sha256)
            os.replace(scratch, path)
        self.trim()
        return path

    def drop(self, sha256: str) -> None:
        """Forget the copy of a blob that was deleted."""
        with contextlib.suppress(OSError):
            (self.root / relative_path(sha256)).unlink(missing_ok=True)

    def folder(self, files: Mapping[str, FileEntry], local: Callable[[FileEntry], Path]) -> Path:
        """A folder of exactly these files; `local` gives a verified file of each.

        Raises:
            BlobError: as `local`, or a name leads out of the folder.
        """
        told = sorted((name, entry.sha256, entry.nbytes) for name, entry in files.items())
        path = self._folders / hashlib.sha256(json.dumps(told).encode()).hexdigest()
        if not self._holds(path, files):
            self.place(files, path, local)
            self.trim()
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def place(self, files: Mapping[str, FileEntry], target: Path, local: Callable[[FileEntry], Path]) -> None:
        """Make the folder beside its place and rename it; one that is there and differs is replaced.

        Raises:
            BlobError: as `local`; a name leads out of the folder; the folder cannot be written.
        """
        for name in files:
            _check_name(name)
        scratch = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        with refusals(f"cannot make {target}"):
            scratch.mkdir(parents=True)
            try:
                for name, entry in files.items():
                    into = scratch / name
                    into.parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(local(entry), into)
                self._swap(scratch, target, files)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _swap(self, scratch: Path, target: Path, files: Mapping[str, FileEntry]) -> None:
        for _ in range(10):
            with contextlib.suppress(OSError):
                os.rename(scratch, target)
                return
            if self._holds(target, files):
                return
            old = target.parent / f".{target.name}.{secrets.token_hex(8)}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, old)
            shutil.rmtree(old, ignore_errors=True)
        raise BlobError(f"{target} cannot be replaced; remove it")

    def _holds(self, folder: Path, files: Mapping[str, FileEntry]) -> bool:
        """Whether the folder has these files and no others, each verified."""
        if not folder.is_dir() or folder.is_symlink():
            return False
        try:
            found = {
                Path(above, name).relative_to(folder).as_posix()
                for above, _, names in os.walk(folder)
                for name in names
            }
            for name, entry in files.items():
                self._verified.check(folder / name, entry)
        except (BlobError, OSError):
            return False
        return found == set(files)

    def trim(self) -> None:
        """Remove what was not used for longest until what only the cache holds fits the limit."""
        items = sorted(self._items(), key=lambda item: item.used)
        held = Counter(inode for item in items for inode in item.inodes)
        sizes = {
            # Bytes with a link elsewhere, as in the blob store itself, cost nothing here.
            inode: 0 if links > held[inode] else nbytes
            for item in items
            for inode, (nbytes, links) in item.inodes.items()
        }
        total = sum(sizes.values())
        recent = time.time() - _IN_USE_SECONDS
        for item in items:
            if total <= self._limit or item.used > recent:
                return
            with contextlib.suppress(OSError):
                shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink()
                held.subtract(item.inodes.keys())
                total -= sum(sizes[inode] for inode in item.inodes if not held[inode])

    def tidy(self) -> None:
        """Remove folders of blobs that were deleted: their links would keep the bytes on the disk."""
        items = self._items()
        held = Counter(inode for item in items for inode in item.inodes if item.path.parent == self._folders)
        recent = time.time() - _IN_USE_SECONDS
        for item in items:
            lone = any(links <= held[inode] for inode, (_, links) in item.inodes.items())
            if lone and item.path.parent == self._folders and item.used <= recent:
                shutil.rmtree(item.path, ignore_errors=True)

    def _items(self) -> list[_Item]:
        found = []
        for path in [*self.root.glob("sha256/??/*"), *self._folders.glob("*")]:
            with contextlib.suppress(OSError):
                about = path.stat()
                if path.is_dir():
                    files = [Path(above, name) for above, _, names in os.walk(path) for name in names]
                    found.append(_Item(path, about.st_mtime, dict(_inode(file) for file in files)))
                else:
                    found.append(_Item(path, max(about.st_atime, about.st_mtime), dict([_inode(path)])))
        return found


def _inode(path: Path) -> tuple[int, tuple[int, int]]:
    about = path.stat()
    return about.st_ino, (about.st_size, about.st_nlink)


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name != "/".join(parts)
        or ".." in parts
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
    ):
        raise BlobError(f"the file name {name!r} is no plain relative path")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNLINKABLE:
            raise
        shutil.copyfile(source, target)
