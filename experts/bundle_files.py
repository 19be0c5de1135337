"""Files as a bundle needs them: digests, no links, durable writes, one writer at a time."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from experts.bundle_manifest import SHARED_NAME, FileEntry
from experts.checkpoint import Checkpoint
from experts.errors import BundleError, CheckpointError, CorruptBundleError, RoutingError
from experts.routing import Router, load_router

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where a file finds no room: on the disk, in the quota, below the largest size."""


def digest(path: Path) -> FileEntry:
    """sha256 and size of one file."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), nbytes=path.stat().st_size)


def open_shared(path: Path) -> Checkpoint:
    """The shared model's tensors, lazily.

    Raises:
        CorruptBundleError: it is not a readable checkpoint.
    """
    try:
        return Checkpoint.open(path)
    except CheckpointError as error:
        raise CorruptBundleError(f"{path}: {error}") from error


def read_router(folder: Path) -> Router:
    """The router of a bundle.

    Raises:
        CorruptBundleError: its files cannot be read.
    """
    try:
        return load_router(folder)
    except RoutingError as error:
        raise CorruptBundleError(str(error)) from error


REGISTRY_NAME = "registry"
"""Folder in a bundle's folder where a server keeps its registry; no part of the bundle."""


def list_files(root: Path) -> tuple[str, ...]:
    """Relative POSIX paths of every file below a folder, sorted, leaving out hidden entries and the registry.

    Raises:
        CorruptBundleError: a symbolic link, or anything else that is neither file nor folder.
    """
    found: list[str] = []
    pending = [root]
    registry = os.path.join(root, REGISTRY_NAME)
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise CorruptBundleError(
                        f"{entry.path} is a symbolic link; a bundle holds plain files only"
                    )
                if entry.name.startswith(".") or entry.path == registry:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    found.append(Path(entry.path).relative_to(root).as_posix())
                else:
                    raise CorruptBundleError(f"{entry.path} is not a plain file")
    return tuple(sorted(found))


def verify_files(root: Path, files: Mapping[str, FileEntry], paths: Iterable[str], *, digests: bool) -> None:
    """Check that files are there, unlinked, of the listed size and, with `digests`, of the listed content.

    Raises:
        CorruptBundleError: naming the first file that is not.
    """
    present = set(list_files(root))
    # transformers reads whatever lies in the shared folder, so a file that nobody listed must not be there.
    for path in sorted(present):
        if path.startswith(f"{SHARED_NAME}/") and path not in files:
            raise CorruptBundleError(f"{root / path} is not part of the bundle; remove it")
    for path in paths:
        if path not in present:
            raise CorruptBundleError(f"{root / path} is missing; restore or rebuild the bundle")
        _verify_content(root / path, files[path], digests=digests)


def verify_file(path: Path, entry: FileEntry, *, digests: bool) -> None:
    """As `verify_files`, for one file that may have changed since the whole bundle was looked at.

    Raises:
        CorruptBundleError: it, or its folder, is a link, or it is not what is listed.
    """
    if path.is_symlink() or path.parent.is_symlink():
        raise CorruptBundleError(f"{path} is a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        raise CorruptBundleError(f"{path} is missing; restore or rebuild the bundle")
    _verify_content(path, entry, digests=digests)


def _verify_content(path: Path, entry: FileEntry, *, digests: bool) -> None:
    size = path.stat().st_size
    if size != entry.nbytes:
        raise CorruptBundleError(f"{path} has {size} bytes, the manifest says {entry.nbytes}; restore it")
    if digests and digest(path) != entry:
        raise CorruptBundleError(f"{path} differs from its sha256 in the manifest; restore it")


def sync_tree(root: Path) -> None:
    """Flush every file and folder below root, and root itself, to the disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A locked, empty, hidden folder beside `target`, removed in the end if it is still there.

    Folders that a killed process left behind for the same target are known by their free lock and removed.

    Raises:
        BundleError: the parent folder cannot be written.
    """
    prefix = f".{target.name}.building-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in [child for child in target.parent.iterdir() if child.name.startswith(prefix)]:
            with contextlib.suppress(OSError), locked(stale, wait=False):
                shutil.rmtree(stale, ignore_errors=True)
        folder = target.parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write beside {target}: {error}") from error
    with locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the folder's advisory lock; it is freed when the process ends, however it ends.

    Raises:
        BlockingIOError: somebody else holds it and `wait` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
