"""The registry's blob store: puts files under their digests, gives verified local files and folders back."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError
from experts.registry.blobs.cache import Cache
from experts.registry.blobs.directory import DirectoryStore
from experts.registry.blobs.files import Verified, hashed_copy, writable
from experts.registry.blobs.remote import ObjectStore
from experts.registry.blobs.store import Store, Stored

_CACHE_BYTES = 16 * 2**30


class Blobs:
    """Files by digest. Thread-safe; every method blocks.

    What a change will need is pinned in the catalogue *before* it is put: so garbage collection can tell it from
    what nobody wants, also where it was stored before.
    """

    def __init__(self, store: Store, cache: Cache) -> None:
        self._store = store
        self._cache = cache

    @classmethod
    def open(
        cls,
        url: str,
        cache: Path,
        options: Mapping[str, Any] | None = None,
        *,
        cache_bytes: int = _CACHE_BYTES,
    ) -> "Blobs":
        """Open a store; nothing is asked of it yet, and nothing written to it.

        Args:
            url: a folder's path or any URL that fsspec knows, as `s3://bucket/prefix`.
            cache: a local folder, best on the disk of a directory store: then folders cost no bytes. Where it
                cannot be written a temporary one is used, which ends with this object.
            options: of the object store's client.
            cache_bytes: what the cache may hold besides what was used in the last minutes.

        Raises:
            BlobError: the URL or its options make no sense, or its client is not installed.
        """
        verified = Verified()
        temporary = None
        if not writable(cache):
            temporary = Path(tempfile.mkdtemp(prefix="twinserve-blobs-"))
            cache = temporary
        kept = Cache(cache, verified, cache_bytes)
        folder = local_folder(url)
        if folder is not None:
            made = cls(DirectoryStore(folder, verified), kept)
        else:
            made = cls(ObjectStore(url, options or {}, kept, verified), kept)
        if temporary is not None:
            weakref.finalize(made, shutil.rmtree, temporary, ignore_errors=True)
        return made

    @property
    def url(self) -> str:
        """Of the store; it may tell more than clients should know."""
        return self._store.url

    def put(self, path: Path, *, known: FileEntry | None = None) -> FileEntry:
        """Store a file, flushed to the disk, whole or not at all; a blob that is there already is mended.

        Args:
            known: its digest, if the caller has it: what is stored and sound is then not read again.

        Raises:
            StorageFullError: no room for it.
            CorruptBlobError: the file is not what `known` says, or arrived damaged.
            BlobError: it cannot be read, or the store cannot be written.
        """
        return self._put(path, known)

    def restore(self, path: Path, entry: FileEntry) -> None:
        """Store a file in place of what is there under its digest, whatever that is.

        Raises:
            CorruptBlobError: the file is another one.
            StorageFullError, BlobError: as `put`.
        """
        with self._store.writing():
            made = hashed_copy(path, self._store.scratch)
            try:
                if made.entry != entry:
                    raise CorruptBlobError(f"{path} is not the blob {entry.sha256}")
                self._store.add(made)
            finally:
                made.path.unlink(missing_ok=True)

    def put_bytes(self, data: bytes) -> FileEntry:
        """As `put`."""
        return self._put(data, None)

    def _put(self, source: Path | bytes, known: FileEntry | None) -> FileEntry:
        with self._store.writing():
            if known is not None and self._store.keep(known):
                return known
            made = hashed_copy(source, self._store.scratch)
            try:
                if known is not None and made.entry != known:
                    raise CorruptBlobError(f"{source!s} changed since its digest was taken; try again")
                if known is not None or not self._store.keep(made.entry):
                    self._store.add(made)
            finally:
                made.path.unlink(missing_ok=True)
            return made.entry

    def path(self, entry: FileEntry) -> Path:
        """A local file of it, its digest verified; not to be changed.

        Raises:
            MissingBlobError: nothing of that digest is stored.
            CorruptBlobError: what is stored is something else, or a link.
            StorageFullError, BlobError: it cannot be read, or fetched.
        """
        return self._store.local(entry)

    def folder(self, files: Mapping[str, FileEntry]) -> Path:
        """A local folder of exactly these files by their names, each verified; not to be changed.

        Made once and kept while there is room: ask again rather than keep its path for long.

        Raises:
            BlobError: as `path`; or a name leads out of the folder.
        """
        return self._cache.folder(files, self.path)

    def place(self, files: Mapping[str, FileEntry], target: Path) -> Path:
        """The same as a folder at `target`, that stays; hard links where they can be.

        Raises:
            BlobError: as `folder`.
        """
        self._cache.place(files, target, self.path)
        return target

    def has(self, sha256: str) -> bool:
        """Whether something is stored under that digest."""
        return self.look(sha256) is not None

    def look(self, sha256: str) -> Stored | None:
        """What is stored under a digest, its content not looked at; None for nothing."""
        return self._store.look(sha256)

    def check(self, entry: FileEntry) -> None:
        """Read what the store has, past caches and whatever was verified before.

        Raises:
            MissingBlobError, CorruptBlobError, BlobError: what is wrong with it.
        """
        self._store.check(entry)

    def list(self) -> Iterator[Stored]:
        """Every blob, unverified, in no order."""
        return self._store.list()

    def delete(self, sha256: str) -> None:
        """Delete a blob and its cached copy; folders that have it keep it until `tidy`."""
        self._store.delete(sha256)

    def sweeping(self) -> AbstractContextManager[None]:
        """Held while leftovers are looked for: puts wait meanwhile."""
        return self._store.sweeping()

    def leftovers(self) -> tuple[str, ...]:
        """What writers left that were killed; to be asked for while `sweeping`."""
        return self._store.leftovers()

    def remove_leftover(self, name: str) -> None:
        """Remove one of `leftovers`."""
        self._store.remove_leftover(name)

    def copies(self) -> tuple[Path, ...]:
        """Local folders that may hold other copies of blobs."""
        return (self._cache.root,)

    def trim(self) -> None:
        """Remove what was not used for longest from a cache that is too large."""
        self._cache.trim()

    def tidy(self) -> None:
        """Remove cached folders of blobs that were deleted, but for those that were asked for just now."""
        self._cache.tidy()

    def close(self) -> None:
        """Close connections; the object is not usable afterwards."""
        self._store.close()


def local_folder(url: str) -> Path | None:
    """The folder that a path or a `file:` URL names; None for an object store's URL."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise BlobError(f"{url}: a file URL has three slashes, file:///folder")
    return Path(unquote(parts.path))
