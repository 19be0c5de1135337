"""What a place for blobs must be able to do, and the words that all of them share."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from experts.bundle_manifest import FileEntry
from experts.registry.blobs.files import Hashed

DIGEST = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
    """One blob as a listing shows it; its content was not looked at.

    Attributes:
        modified: seconds since 1970 by the store's clock.
    """

    sha256: str
    nbytes: int
    modified: float


class Store(Protocol):
    """A folder or an object store. Every method may block, and may be called from any thread."""

    url: str
    scratch: Path
    """Local folder of files that are being put; on the disk where `add` wants them."""

    def writing(self) -> AbstractContextManager[None]:
        """Held while something is put."""

    def sweeping(self) -> AbstractContextManager[None]:
        """Held while leftovers are looked for: nobody who shares the scratch folder puts anything meanwhile."""

    def add(self, made: Hashed) -> None:
        """Take a hashed local file into the store, durably; the file is the store's from then on."""

    def keep(self, entry: FileEntry) -> bool:
        """Whether it is stored whole, so that it need not be added."""

    def local(self, entry: FileEntry) -> Path:
        """A local file of it whose digest was verified."""

    def check(self, entry: FileEntry) -> None:
        """Read what the store has, whatever was verified before."""

    def look(self, sha256: str) -> Stored | None:
        """As a listing would show it; None if it is not there."""

    def list(self) -> Iterator[Stored]:
        """Every blob."""

    def delete(self, sha256: str) -> None:
        """Forget it; no error if it is not there."""

    def leftovers(self) -> tuple[str, ...]:
        """What interrupted writers left, by names that mean something to `remove_leftover`."""

    def remove_leftover(self, name: str) -> None:
        """Remove one."""

    def close(self) -> None:
        """Give up connections."""


def relative_path(sha256: str) -> str:
    """Where a blob lies below a store's root.

    Raises:
        ValueError: that is no digest.
    """
    if not DIGEST.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is no sha256 in lower-case hexadecimal digits")
    return f"sha256/{sha256[:2]}/{sha256}"
