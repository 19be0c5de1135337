"""Blobs in a folder of this machine, or of one that is mounted."""

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from experts.bundle_files import sync
from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError
from experts.registry.blobs.files import Hashed, Verified, lock, make_folder, refusals
from experts.registry.blobs.store import DIGEST, Stored, relative_path


class DirectoryStore:
    """`sha256/ab/abcd…` below a folder, each file written under another name, flushed and renamed.

    Nothing is written before something is put, so that a folder without permission to write can be read.
    """

    def __init__(self, root: Path, verified: Verified) -> None:
        self.url = str(root)
        self.scratch = root / "incoming"
        self._root = root
        self._verified = verified

    def writing(self) -> AbstractContextManager[None]:
        """Shared by all who put."""
        return lock(self._root / "lock", alone=False)

    def sweeping(self) -> AbstractContextManager[None]:
        """Nobody puts: whatever lies among the scratch files was left there."""
        return lock(self._root / "lock", alone=True)

    def add(self, made: Hashed) -> None:
        """Rename it into its place, over a blob that may be there: what is new was just hashed."""
        target = self._file(made.entry.sha256)
        with refusals(f"cannot store {target}"):
            self._refuse_links(target)
            make_folder(target.parent, self._root)
            self._verified.trust(made.path, made.entry.sha256)
            os.replace(made.path, target)
            sync(target.parent)

    def keep(self, entry: FileEntry) -> bool:
        """As `Store`; a corrupt one is not whole, and is replaced when it is added."""
        try:
            self.local(entry)
        except BlobError:
            return False
        return True

    def local(self, entry: FileEntry) -> Path:
        """The blob itself."""
        path = self._file(entry.sha256)
        self._refuse_links(path)
        self._verified.check(path, entry)
        return path

    def check(self, entry: FileEntry) -> None:
        """As `Store`."""
        path = self._file(entry.sha256)
        self._refuse_links(path)
        self._verified.check(path, entry, again=True)

    def look(self, sha256: str) -> Stored | None:
        """As `Store`."""
        path = self._file(sha256)
        try:
            about = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BlobError(f"cannot look at {path}: {error}") from error
        return Stored(sha256, about.st_size, about.st_mtime) if stat.S_ISREG(about.st_mode) else None

    def list(self) -> Iterator[Stored]:
        """Plain files with a digest for a name; others are none of ours."""
        with refusals(f"cannot list {self._root}"):
            for folder in _entries(self._root / "sha256"):
                if not folder.is_dir(follow_symlinks=False):
                    continue
                for entry in _entries(Path(folder.path)):
                    if not DIGEST.fullmatch(entry.name) or entry.name[:2] != folder.name:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        about = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(about.st_mode):
                            yield Stored(entry.name, about.st_size, about.st_mtime)

    def delete(self, sha256: str) -> None:
        """As `Store`."""
        path = self._file(sha256)
        with refusals(f"cannot delete {path}"):
            self._refuse_links(path)
            path.unlink(missing_ok=True)

    def leftovers(self) -> tuple[str, ...]:
        """Files of writers that were killed, told while nobody writes."""
        with refusals(f"cannot list {self.scratch}"):
            return tuple(sorted(entry.path for entry in _entries(self.scratch)))

    def remove_leftover(self, name: str) -> None:
        """As `Store`."""
        with refusals(f"cannot delete {name}"):
            Path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is open."""

    def _file(self, sha256: str) -> Path:
        return self._root / relative_path(sha256)

    def _refuse_links(self, path: Path) -> None:
        """The last part is `Verified`'s to refuse; deleting or replacing a link leaves its target alone."""
        for folder in (path.parent.parent, path.parent):
            if folder.is_symlink():
                raise CorruptBlobError(
                    f"{folder} is a symbolic link; the blob store holds plain folders only"
                )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
