"""Uploads on disk: files that arrive in pieces, survive a restart and go when nobody uses them.

An upload is a folder: the files below `files`, and `upload.json`, which alone says how long each is. That is written
after a file was synced to the disk, so bytes beyond it were never acknowledged and are cut off when writing goes on.
"""

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from experts.bundle_files import digest, sync
from experts.bundle_manifest import FileEntry
from experts.errors import (
    OffsetError,
    RecordNotFoundError,
    RegistryFullError,
    SourceTooLargeError,
    TransitionError,
)
from experts.registry.records import Files, new_id
from experts.registry.sources.disk import disk, locked, try_lock
from experts.registry.sources.names import check_file_name
from experts.registry.sources.upload import Upload, UploadLimits, UploadState
from experts.registry.sources.writer import FileWriter

_STATE = "upload.json"
_FILES = "files"
_LOCK = ".lock"
_ID = re.compile(r"upload-[0-9a-f]{24}")


class UploadStore:
    """Uploads below one folder, which several servers may share.

    Ages count on the monotonic clock, from a restart on anew: a wall clock that jumps removes nothing.

    Args:
        root: made when the first upload begins.
        clock: monotonic seconds.
        released: called with each id before its upload is gone, so that nothing is kept for it for ever.
    """

    def __init__(
        self,
        root: Path,
        limits: UploadLimits,
        clock: Callable[[], float] = time.monotonic,
        released: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._root = root
        self._limits = limits
        self._clock = clock
        self._released = released
        self._lock = threading.RLock()
        self._depth = 0
        self._seen: dict[str, tuple[int, float]] = {}
        """Upload → when its state was written by the file's own clock, and when that was noticed by ours."""
        self._pending: dict[str, int] = {}
        """Upload → bytes that writers have taken and not secured yet."""

    @property
    def limits(self) -> UploadLimits:
        """What uploads may take."""
        return self._limits

    def create(self) -> Upload:
        """Begin an upload.

        Raises:
            RegistryFullError: too many are begun already.
            StorageFullError, BlobError: the disk refuses.
        """
        with disk(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        self.expire()
        with self._locked():
            begun = sum(not upload.registered for upload in self.all())
            if begun >= self._limits.uploads:
                raise RegistryFullError(
                    f"{begun} uploads are begun already, the limit is {self._limits.uploads} (max_uploads); "
                    "register or remove one"
                )
            upload_id = new_id("upload")
            (self._root / upload_id / _FILES).mkdir(mode=0o700, parents=True)
            self._write_state(upload_id, UploadState())
            sync(self._root)
            return self.describe(upload_id)

    def all(self) -> tuple[Upload, ...]:
        """Every upload, by id."""
        found = []
        for name in self._names():
            with contextlib.suppress(RecordNotFoundError):
                found.append(self.describe(name))
        return tuple(found)

    def describe(self, upload_id: str) -> Upload:
        """One upload.

        Raises:
            RecordNotFoundError: there is none of that id.
        """
        state = self._state(upload_id)
        return Upload(upload_id, dict(state.files), dict(state.registered), self._left(upload_id))

    @contextlib.contextmanager
    def writing(self, upload_id: str, name: str, offset: int) -> Iterator[FileWriter]:
        """Go on with one file at `offset`; what was written is safe on the disk when the block ends.

        That holds where it ends with an error too: the bytes that came before it count, and writing can go on.

        Raises:
            RecordNotFoundError: no such upload.
            CheckpointError, SourceError: the file's name is not one that an expert has.
            TransitionError: it was registered already, or somebody else writes to the file now.
            OffsetError: the file ends elsewhere; tells where.
            StorageFullError, BlobError: the disk refuses.
        """
        check_file_name(name)
        with contextlib.ExitStack() as stack:
            with self._locked():
                size = self._open_state(upload_id).files.get(name, 0)
                file = stack.enter_context(self._file(upload_id, name))
                if not try_lock(file):
                    raise TransitionError(
                        f"{name} of {upload_id} is being written by another request; wait until that ends"
                    )
                if offset != size:
                    raise OffsetError(f"{name} of {upload_id} ends at {size}, not at {offset}; go on there")
                with disk(self._root):
                    file.truncate(size)
                    file.seek(size)
            yield stack.enter_context(
                FileWriter(
                    file,
                    self._root,
                    size,
                    take=lambda nbytes: self._take(upload_id, nbytes),
                    secured=lambda end, nbytes: self._secured(upload_id, name, end, nbytes),
                )
            )

    def remove_file(self, upload_id: str, name: str) -> Upload:
        """Forget one file, to send it anew.

        Raises:
            RecordNotFoundError: no such upload or file.
            TransitionError: the upload was registered already, or is being written to.
        """
        with self._locked():
            state = self._open_state(upload_id)
            if name not in state.files:
                raise RecordNotFoundError(f"{upload_id} has no file {name[:128]!a}")
            self._require_idle(upload_id)
            files = {kept: size for kept, size in state.files.items() if kept != name}
            self._write_state(upload_id, UploadState(files=files))
            (self._root / upload_id / _FILES / name).unlink(missing_ok=True)
            return self.describe(upload_id)

    def remove(self, upload_id: str) -> None:
        """Remove an upload with its files.

        Raises:
            RecordNotFoundError: there is none of that id.
            TransitionError: it is being written to.
        """
        with self._locked():
            self._state(upload_id)
            self._require_idle(upload_id)
            self._released(upload_id)
            self._discard(upload_id)

    def folder(self, upload_id: str) -> Path:
        """Where the files of an upload that is not registered yet lie.

        Raises:
            RecordNotFoundError: no such upload.
            TransitionError: it is registered, empty, or being written to.
        """
        with self._locked():
            state = self._open_state(upload_id)
            self._require_idle(upload_id)
            if not state.files:
                raise TransitionError(f"{upload_id} has no files yet; send them first")
            folder = self._root / upload_id / _FILES
            for entry in folder.iterdir():
                if entry.name in state.files:
                    os.truncate(entry, state.files[entry.name])  # what was never acknowledged
                else:
                    entry.unlink()
            return folder

    def digests(self, upload_id: str) -> dict[Path, FileEntry]:
        """Every file of an upload that is not registered yet, with what it holds; reads them all.

        Raises:
            RecordNotFoundError, TransitionError: as `folder`.
        """
        folder = self.folder(upload_id)
        with disk(self._root):
            return {folder / name: digest(folder / name) for name in sorted(self._state(upload_id).files)}

    def close(self, upload_id: str, stored: Files) -> None:
        """Registered: the blob store holds the files now, so they go here. It can be registered again as it is.

        Raises:
            RecordNotFoundError: no such upload.
            TransitionError: it is being written to.
        """
        with self._locked():
            state = self._state(upload_id)
            self._require_idle(upload_id)
            self._write_state(upload_id, UploadState(files=state.files, registered=dict(stored)))
            for name in state.files:
                (self._root / upload_id / _FILES / name).unlink(missing_ok=True)

    def expire(self) -> tuple[str, ...]:
        """Remove uploads that have rested too long, and what crashes left; returns the ids that are gone."""
        gone: list[str] = []
        if not self._names():
            return ()
        with self._locked():
            for name in self._names():
                try:
                    self._state(name)
                    if self._left(name) > 0:
                        continue
                    self._require_idle(name)
                except RecordNotFoundError:
                    pass  # begun or removed by halves
                except TransitionError:
                    continue
                self._released(name)
                self._discard(name)
                gone.append(name)
        return tuple(gone)

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._root) if _ID.fullmatch(entry.name))
        except FileNotFoundError:  # no upload was ever begun
            return []

    def _left(self, upload_id: str) -> float:
        """Seconds until the upload has rested too long, as far as this process can tell."""
        with contextlib.suppress(FileNotFoundError):
            stamp = (self._root / upload_id / _STATE).stat().st_mtime_ns
            known, since = self._seen.get(upload_id, (-1, 0.0))
            if stamp != known:
                since = self._clock()
                self._seen[upload_id] = stamp, since
            return max(0.0, since + self._limits.seconds - self._clock())
        return 0.0

    def _take(self, upload_id: str, nbytes: int) -> None:
        """Count bytes that a writer is about to write.

        Raises:
            SourceTooLargeError: they are too many.
        """
        with self._lock:
            pending = self._pending.get(upload_id, 0) + nbytes
            if sum(self._state(upload_id).files.values()) + pending > self._limits.nbytes:
                raise SourceTooLargeError(
                    f"{upload_id} is larger than {self._limits.nbytes} bytes (max_source_bytes)"
                )
            self._pending[upload_id] = pending

    def _secured(self, upload_id: str, name: str, end: int, nbytes: int) -> None:
        with self._locked():
            state = self._state(upload_id)
            self._write_state(upload_id, UploadState(files={**state.files, name: end}))
            self._pending[upload_id] = self._pending.get(upload_id, 0) - nbytes
            if self._pending[upload_id] <= 0:
                del self._pending[upload_id]

    @contextlib.contextmanager
    def _file(self, upload_id: str, name: str) -> Iterator[BinaryIO]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with disk(self._root):
            handle = os.open(self._root / upload_id / _FILES / name, flags, 0o600)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            yield file

    def _require_idle(self, upload_id: str) -> None:
        for entry in (self._root / upload_id / _FILES).iterdir():
            with entry.open("rb") as file:
                if not try_lock(file):
                    raise TransitionError(
                        f"{entry.name} of {upload_id} is being written to; wait until that ends"
                    )

    def _discard(self, upload_id: str) -> None:
        # Without its state it is no upload any more, whatever else a crash leaves.
        (self._root / upload_id / _STATE).unlink(missing_ok=True)
        shutil.rmtree(self._root / upload_id)
        self._seen.pop(upload_id, None)

    def _open_state(self, upload_id: str) -> UploadState:
        state = self._state(upload_id)
        if state.registered:
            raise TransitionError(f"{upload_id} is registered already; begin another upload")
        return state

    def _state(self, upload_id: str) -> UploadState:
        if not _ID.fullmatch(upload_id):
            raise RecordNotFoundError(f"there is no upload {upload_id[:128]!a}")
        try:
            return UploadState.model_validate_json((self._root / upload_id / _STATE).read_bytes())
        except FileNotFoundError as error:
            raise RecordNotFoundError(
                f"there is no upload {upload_id}; one that rests for {self._limits.seconds:g} s is removed"
            ) from error
        except ValidationError as error:
            raise RecordNotFoundError(f"the upload {upload_id} cannot be read; begin another one") from error

    def _write_state(self, upload_id: str, state: UploadState) -> None:
        """Replace upload.json in one step that survives a power cut."""
        folder = self._root / upload_id
        scratch = folder / f"{_STATE}.new"
        with scratch.open("wb") as file:
            file.write(state.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(folder / _STATE)
        sync(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes what uploads there are, in this process or another; held for moments only."""
        with self._lock, disk(self._root), contextlib.ExitStack() as stack:
            if not self._depth:
                if not self._root.is_dir():
                    raise RecordNotFoundError("there are no uploads")
                stack.enter_context(locked(self._root / _LOCK))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
