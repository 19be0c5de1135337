"""Whether every file that the catalogue needs is stored and sound, and nothing else is stored."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError, MissingBlobError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.verify.findings import Finding, mend
from experts.registry.verify.garbage import unneeded
from experts.registry.verify.needs import Needs


def check_blobs(
    catalogue: Catalogue, blobs: Blobs, needs: Needs, folders: Sequence[Path], *, repair: bool, deep: bool
) -> Iterator[Finding]:
    """Missing and corrupt blobs, stored again from any local copy that is left."""
    copies = _Copies([*blobs.copies(), *folders])
    stored = {blob.sha256: blob.nbytes for blob in blobs.list()}
    for entry, what in needs.files.items():
        problem = _problem(blobs, entry, stored.get(entry.sha256), deep=deep)
        if problem is None or not _still_needed(catalogue, entry):
            continue
        finding = Finding(
            "corrupt_blob" if isinstance(problem, CorruptBlobError) else "missing_blob",
            f"blob {entry.sha256}",
            f"{_told(what)}: {problem}; restore it from a backup, register the expert again, or roll it back",
        )
        yield _restored(blobs, entry, copies, finding) if repair else finding


def _problem(blobs: Blobs, entry: FileEntry, nbytes: int | None, *, deep: bool) -> BlobError | None:
    try:
        if nbytes is None:
            # What is no plain file is not listed, and more than missing.
            blobs.check(entry)
        elif nbytes != entry.nbytes:
            return CorruptBlobError(f"{nbytes} bytes are stored instead of {entry.nbytes}")
        elif deep:
            blobs.check(entry)
    except (MissingBlobError, CorruptBlobError) as error:
        return error
    return None


def _still_needed(catalogue: Catalogue, entry: FileEntry) -> bool:
    """Garbage collection may have come in between."""
    return entry.sha256 in catalogue.referenced()


def _restored(blobs: Blobs, entry: FileEntry, copies: "_Copies", finding: Finding) -> Finding:
    for path in copies.of(entry):
        try:
            blobs.restore(path, entry)
        except CorruptBlobError:
            continue  # of the same size, and something else
        except BlobError as error:
            return finding.despite(error)
        return finding.by(f"stored again from {path}")
    return finding


class _Copies:
    """Files of given folders by their size; looked for when the first one is wanted."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._found: dict[int, list[Path]] | None = None

    def of(self, entry: FileEntry) -> list[Path]:
        """Files that may be it."""
        if self._found is None:
            self._found = self._look()
        return self._found.get(entry.nbytes, [])

    def _look(self) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = defaultdict(list)
        for folder in self._folders:
            for above, _, names in os.walk(folder):
                for path in (Path(above, name) for name in names):
                    if path.is_file() and not path.is_symlink():
                        found[path.stat().st_size].append(path)
        return found


def check_orphans(
    catalogue: Catalogue, blobs: Blobs, grace_seconds: float, *, repair: bool
) -> Iterator[Finding]:
    """Blobs that nothing needs."""
    for blob in unneeded(catalogue, blobs, grace_seconds, delete=repair):
        finding = Finding(
            "orphan_blob",
            f"blob {blob.sha256}",
            f"nothing needs its {blob.nbytes} bytes; `twinserve registry gc` deletes it",
        )
        yield finding.by("deleted") if repair else finding


def check_leftovers(blobs: Blobs, *, repair: bool) -> Iterator[Finding]:
    """Half-written files of processes that were killed."""
    with blobs.sweeping():
        left = blobs.leftovers()
        for name in left:
            finding = Finding("leftover", name, "an interrupted writer left it")
            yield mend(finding, "removed", partial(blobs.remove_leftover, name), repair=repair)


def _told(what: Sequence[str]) -> str:
    more = f" and {len(what) - 1} more" if len(what) > 1 else ""
    return f"needed by {what[0]}{more}"
