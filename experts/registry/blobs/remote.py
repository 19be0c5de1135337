"""Blobs in an object store, through fsspec: uploads that are looked at again, copies in a local cache."""

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from experts.bundle_files import NO_ROOM
from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError, MissingBlobError, StorageFullError
from experts.registry.blobs.cache import Cache
from experts.registry.blobs.files import Hashed, Verified, lock, refusals
from experts.registry.blobs.store import DIGEST, Stored, relative_path

_BLOCK = 8 * 2**20
_UPLOAD_SECONDS = 86_400.0
"""Parts of an upload that was begun so long ago belong to nobody any more."""

_STORE_FULL = re.compile(r"StorageFull|QuotaExceeded|InsufficientStorage|EntityTooLarge", re.IGNORECASE)
_LEFT_UPLOAD = "upload:"


class ObjectStore:
    """`sha256/ab/abcd…` below a URL. An object is there whole or not at all: stores write atomically.

    Raises:
        BlobError: no client for such URLs is installed, or it refuses the options.
    """

    def __init__(self, url: str, options: Mapping[str, Any], cache: Cache, verified: Verified) -> None:
        scheme = url.partition("://")[0]
        try:
            found = fsspec.core.url_to_fs(
                url, **{"use_listings_cache": False, "skip_instance_cache": True, **options}
            )
        except ImportError as error:
            extra = "twinserve[s3]" if scheme == "s3" else f"fsspec[{scheme}]"
            raise BlobError(
                f"{url}: no client of {scheme}:// is installed; `pip install '{extra}'`"
            ) from error
        except (ValueError, TypeError) as error:
            raise BlobError(f"{url}: {error}; correct the URL or the options of the blob store") from error
        self._fs: fsspec.AbstractFileSystem = found[0]
        self._root = str(found[1]).rstrip("/")
        self.url = url
        self.scratch = cache.scratch
        self._cache = cache
        self._verified = verified

    def writing(self) -> AbstractContextManager[None]:
        """Guards the local scratch files alone: other machines are not in reach."""
        return lock(self._cache.root / "lock", alone=False)

    def sweeping(self) -> AbstractContextManager[None]:
        """As `writing`."""
        return lock(self._cache.root / "lock", alone=True)

    def add(self, made: Hashed) -> None:
        """Upload, look at what has arrived, keep the local file as the cached copy."""
        name = self._name(made.entry.sha256)
        with self._refusals(f"cannot store {name}", BlobError):
            self._fs.put_file(str(made.path), name)
            about = self._fs.info(name)
            etag = str(about.get("ETag", "")).strip('"')
            if about["size"] != made.entry.nbytes or etag != made.md5:
                # Large files arrive in parts, encrypted ones under other tags: then only reading tells.
                self.check(made.entry)
        self._cache.take(made.path, made.entry)

    def keep(self, entry: FileEntry) -> bool:
        """As `Store`; of what was uploaded whole the size tells enough."""
        found = self.look(entry.sha256)
        return found is not None and found.nbytes == entry.nbytes

    def local(self, entry: FileEntry) -> Path:
        """The cached copy, fetched if it is missing or was damaged."""
        return self._cache.find(entry) or self._fetch(entry)

    def _fetch(self, entry: FileEntry) -> Path:
        name = self._name(entry.sha256)
        for last in (False, True):
            scratch = self.scratch / secrets.token_hex(16)
            with self.writing(), contextlib.ExitStack() as stack:
                with refusals(f"cannot write to {self.scratch}"):
                    self.scratch.mkdir(parents=True, exist_ok=True)
                stack.callback(scratch.unlink, missing_ok=True)
                with self._refusals(f"cannot read {name}"):
                    self._fs.get_file(name, str(scratch))
                try:
                    self._verified.check(scratch, entry)
                except CorruptBlobError as error:
                    if not last:
                        continue
                    raise CorruptBlobError(
                        f"{self._told(name)} differs from its digest; `twinserve registry verify --repair` mends it "
                        "where another copy is left"
                    ) from error
                return self._cache.take(scratch, entry)
        raise AssertionError("unreachable")

    def check(self, entry: FileEntry) -> None:
        """Read the object itself, block by block, past the cache."""
        name = self._name(entry.sha256)
        found, size = hashlib.sha256(), 0
        with self._refusals(f"cannot read {name}"), self._fs.open(name, "rb", block_size=_BLOCK) as file:
            while block := file.read(_BLOCK):
                found.update(block)
                size += len(block)
        if size != entry.nbytes or found.hexdigest() != entry.sha256:
            raise CorruptBlobError(
                f"{self._told(name)} has {size} bytes of digest {found.hexdigest()} instead of {entry.nbytes} of "
                f"{entry.sha256}"
            )

    def look(self, sha256: str) -> Stored | None:
        """As `Store`."""
        try:
            with self._refusals("cannot look"):
                about = self._fs.info(self._name(sha256))
        except MissingBlobError:
            return None
        return Stored(sha256, int(about["size"]), _modified(about))

    def list(self) -> Iterator[Stored]:
        """As `Store`."""
        with self._refusals("cannot list"):
            try:
                found = self._fs.find(f"{self._root}/sha256", detail=True)
            except FileNotFoundError:
                return
        for path, about in found.items():
            name = path.rpartition("/")[2]
            if DIGEST.fullmatch(name):
                yield Stored(name, int(about["size"]), _modified(about))

    def delete(self, sha256: str) -> None:
        """As `Store`."""
        with contextlib.suppress(MissingBlobError), self._refusals("cannot delete"):
            self._fs.rm_file(self._name(sha256))
        self._cache.drop(sha256)

    def leftovers(self) -> tuple[str, ...]:
        """Local files of writers that were killed, and parts of uploads that nobody ends."""
        local = sorted(str(path) for path in self.scratch.glob("*")) if self.scratch.is_dir() else ()
        return (*local, *(f"{_LEFT_UPLOAD}{key} {upload}" for key, upload in self._uploads()))

    def remove_leftover(self, name: str) -> None:
        """As `Store`."""
        if name.startswith(_LEFT_UPLOAD):
            key, _, upload = name.removeprefix(_LEFT_UPLOAD).rpartition(" ")
            with self._refusals(f"cannot end the upload of {key}"):
                self._fs.abort_mpu(self._root.partition("/")[0], key, upload)
            return
        with refusals(f"cannot delete {name}"):
            Path(name).unlink(missing_ok=True)

    def _uploads(self) -> tuple[tuple[str, str], ...]:
        """Key and id of uploads in parts that rest; none where the store has no such thing."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return ()
        bucket, _, prefix = self._root.partition("/")
        with self._refusals("cannot list uploads", BlobError):
            found = self._fs.list_multipart_uploads(bucket)
        return tuple(
            (str(one["Key"]), str(one["UploadId"]))
            for one in found
            if str(one["Key"]).startswith(f"{prefix}/sha256/" if prefix else "sha256/")
            and time.time() - one["Initiated"].timestamp() > _UPLOAD_SECONDS
        )

    def close(self) -> None:
        """Close the client's connections."""
        close = getattr(self._fs, "close_session", None)
        client = getattr(self._fs, "_s3creator", None)
        if close is not None and client is not None:
            close(self._fs.loop, client)

    def _name(self, sha256: str) -> str:
        return f"{self._root}/{relative_path(sha256)}"

    def _told(self, name: str) -> str:
        return f"{self.url.rstrip('/')}{name.removeprefix(self._root)}"

    @contextlib.contextmanager
    def _refusals(self, what: str, absent: type[BlobError] = MissingBlobError) -> Iterator[None]:
        """Whatever the store's client raises, as ours; `absent` where it says that something is not there.

        Raises:
            MissingBlobError, StorageFullError, BlobError: telling the store's URL.
        """
        try:
            yield
        except (BlobError, GeneratorExit):
            raise
        except FileNotFoundError as error:
            raise absent(f"{self.url}: {what}: it is not there ({error})") from error
        except Exception as error:  # whatever the client of this store has
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise StorageFullError(f"{what}: the local disk is full ({error}); make room") from error
            if _STORE_FULL.search(f"{type(error).__name__} {error}") or _STORE_FULL.search(
                str(error.__cause__)
            ):
                raise StorageFullError(f"{self.url}: {what}: the store is full ({error})") from error
            raise BlobError(f"{self.url}: {what}: {error or type(error).__name__}") from error


def _modified(about: Mapping[str, Any]) -> float:
    """Seconds since 1970; 0 where a store does not tell."""
    for word in ("LastModified", "last_modified", "updated", "created", "mtime"):
        told = about.get(word)
        if isinstance(told, datetime):
            return told.timestamp()
        if isinstance(told, int | float):
            return float(told)
        if isinstance(told, str) and told:
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(told).timestamp()
    return 0.0
