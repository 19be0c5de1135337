"""Which folders of this machine an administrator may name: those below one root, whatever links say."""

import os
from pathlib import Path

from service.errors import (
    ExpertRejectedError,
    FolderNotFoundError,
    InvalidRequestError,
    PathNotAllowedError,
)

_MAX_ENTRIES = 10_000


def confine(root: Path | None, path: str) -> Path:
    """The folder that `path` names, resolved, with everything in it below `root`.

    Whoever can write below the root while this runs can still swap a file afterwards: the root must be
    writable by administrators alone.

    Args:
        root: the configured root; None allows nothing.
        path: relative to the root, or absolute below it.

    Raises:
        PathNotAllowedError: it, or a link inside it, leads out of the root; or there is no root.
        InvalidRequestError: it cannot be a path.
        FolderNotFoundError: it does not exist.
        ExpertRejectedError: it holds something that is neither a file nor a folder.
    """
    if root is None:
        raise PathNotAllowedError(
            "Registering from folders is off: start the server with TWINSERVE_EXPERTS_ROOT set.", param="path"
        )
    if not path.isprintable():
        raise InvalidRequestError("path holds characters that no path should.", param="path")
    real_root = root.resolve()
    folder = _resolved(real_root / path)
    if folder == real_root or not folder.is_relative_to(real_root):
        raise PathNotAllowedError(
            f"The path {path!r} is not below the experts' root (TWINSERVE_EXPERTS_ROOT).", param="path"
        )
    if not _is_folder(folder):
        raise FolderNotFoundError(f"There is no folder {path!r} below the experts' root.", param="path")
    _check_entries(folder, real_root)
    return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long to exist
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # too long, or links in a circle
        raise InvalidRequestError(f"path cannot be resolved: {error}.", param="path") from error


def _check_entries(folder: Path, real_root: Path) -> None:
    """Everything below `folder` is a plain file or folder below the root; a pipe would block its reader."""
    seen = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(parent, name)
            seen += 1
            if seen > _MAX_ENTRIES:
                raise ExpertRejectedError(f"{folder} holds more than {_MAX_ENTRIES} entries.", param="path")
            if not _resolved(entry).is_relative_to(real_root):
                raise PathNotAllowedError(
                    f"{entry.relative_to(real_root)} leads out of the root (TWINSERVE_EXPERTS_ROOT).",
                    param="path",
                )
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise ExpertRejectedError(
                    f"{entry.relative_to(real_root)} is neither a file nor a folder; remove it.",
                    param="path",
                )
