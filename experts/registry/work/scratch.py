"""A folder for half-made files that nobody needs after a crash: the next one to start removes it."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from experts.bundle_files import locked
from experts.registry.blobs.files import refusals

_PREFIX = "work-"


class Scratch:
    """This process's folder below a root that several processes may share. Made by `opened`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def opened(cls, root: Path) -> Iterator["Scratch"]:
        """A new folder, removed in the end; what processes that ended left behind is removed at once.

        Whose process lives is told by a lock, which the kernel frees however a process ends.

        Raises:
            StorageFullError, BlobError: the root cannot be written.
        """
        with contextlib.ExitStack() as held:
            with refusals(f"{root} cannot be used for half-made files"):
                root.mkdir(parents=True, exist_ok=True)
                # Nobody else may take a folder for a dead one's before it is locked.
                with locked(root):
                    for stale in [child for child in root.iterdir() if child.name.startswith(_PREFIX)]:
                        with contextlib.suppress(OSError), locked(stale, wait=False):
                            shutil.rmtree(stale, ignore_errors=True)
                    path = root / f"{_PREFIX}{secrets.token_hex(6)}"
                    path.mkdir()
                    held.enter_context(locked(path))
            try:
                yield cls(path)
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """A new empty folder; whatever had the name is removed.

        Raises:
            StorageFullError, BlobError: it cannot be made.
        """
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        with refusals(f"{path} cannot be made"):
            path.mkdir(parents=True)
        return path

    def remove(self, name: str) -> None:
        """Remove a folder; no error if there is none."""
        shutil.rmtree(self.path / name, ignore_errors=True)
