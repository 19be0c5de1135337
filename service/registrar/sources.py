"""Where the fine-tunes of registrations come from: folders of this machine, uploads, URLs.

What a client asks for is settled before its job is: an upload's files go into the blob store, and the job names them
by their digests, so that any replica can run it. A folder or a URL is read by whoever runs the job.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from experts.errors import BlobError, ExpertsError, MissingBlobError, RecordNotFoundError
from experts.registry.blobs import Blobs
from experts.registry.records import Files
from experts.registry.sources import (
    FetchPolicy,
    UploadLimits,
    UploadStore,
    digest_of_files,
    fetch,
    inspect_source,
    parse_prefixes,
    read_files,
    read_keys,
    signature_beside,
    verify,
    write_files,
)
from service.registrar.paths import confine
from service.registrar.translate import translate
from service.settings import Settings

SOURCES = ("path", "upload", "url")


class Pins(Protocol):
    """Keeps blobs from being collected; the catalogue."""

    def pin_blobs(self, holder: str, digests: Iterable[str]) -> None:
        """Blobs of these digests are needed by `holder`."""

    def unpin_blobs(self, holder: str) -> None:
        """Not any more."""


class Sources:
    """The three kinds of sources. Every method blocks.

    Args:
        root: the only folder to register from; None allows none.
        uploads: what clients send.
        policy: what URLs may be read.
        keys: file of trusted keys, read at each use; None takes unsigned sources.
        blobs: takes the files of uploads.
        pins: told what uploads need of them.
    """

    def __init__(
        self,
        root: Path | None,
        uploads: UploadStore,
        policy: FetchPolicy,
        keys: Path | None,
        blobs: Blobs,
        pins: Pins,
    ) -> None:
        self._root = root
        self.uploads = uploads
        self.policy = policy
        self.keys = keys
        self._blobs = blobs
        self._pins = pins

    @classmethod
    def of(cls, settings: Settings, state: Path, blobs: Blobs, pins: Pins) -> "Sources":
        """As the settings say.

        Args:
            state: the registry's folder.

        Raises:
            ValueError: a URL prefix, the store's options or the file of trusted keys cannot be used.
        """
        secret = settings.blob_options
        try:
            options: dict[str, Any] = json.loads(secret.get_secret_value()) if secret is not None else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"blob_options is not a JSON object: {error}") from error
        try:
            policy = FetchPolicy(
                parse_prefixes(settings.source_urls),
                private=settings.source_private,
                max_bytes=settings.max_source_bytes,
                seconds=settings.registration_seconds,
                options=options,
            )
            if settings.signature_keys is not None:
                read_keys(settings.signature_keys)
        except ExpertsError as error:
            raise ValueError(str(error)) from error
        limits = UploadLimits(settings.max_source_bytes, settings.max_uploads, settings.upload_seconds)
        uploads = UploadStore(state / "uploads", limits, released=pins.unpin_blobs)
        return cls(settings.experts_root, uploads, policy, settings.signature_keys, blobs, pins)

    def admit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request with its source settled, before a job is made of it.

        A folder must be there and below the root, a URL on the allow-list; an upload's files are inspected, their
        signature is verified, and the blob store has them afterwards. Admitting an upload again gives the same.

        Raises:
            TwinserveError: the source is refused; `param` names its field.
        """
        kind, value = _source_of(request)
        with refusing(kind):
            if kind == "path":
                confine(self._root, value)
            elif kind == "url":
                self.policy.check(value)
            else:
                return {**request, "files": write_files(self._store(value, request.get("signature")))}
        return dict(request)

    def resolve(self, request: Mapping[str, Any], scratch: Path) -> Path:
        """A local folder of an admitted request's source; a fetched one is below `scratch`.

        Raises:
            TwinserveError: the source is refused, or is not there any more; `param` names its field.
        """
        kind, value = _source_of(request)
        with refusing(kind):
            if kind == "path":
                return confine(self._root, value)
            if kind == "url":
                target = scratch / "source"
                target.mkdir()
                return fetch(value, target, self.policy)
            try:
                return self._blobs.folder(read_files(request.get("files", {})))
            except MissingBlobError as error:
                raise RecordNotFoundError(f"the files of {value} are gone; upload them again") from error

    def remove(self, upload_id: str) -> None:
        """Remove an upload; what was registered of it stays.

        Raises:
            TwinserveError: there is none of that id, or it is being written to.
        """
        with refusing("upload"):
            self.uploads.remove(upload_id)

    def expire(self) -> None:
        """Remove uploads that have rested too long.

        Raises:
            TwinserveError: the disk or the catalogue refuses.
        """
        with refusing("upload"):
            self.uploads.expire()

    def _store(self, upload_id: str, signature: str | None) -> Files:
        """What the blob store holds of an upload; puts it there the first time."""
        known = self.uploads.describe(upload_id).registered
        if known and all(self._blobs.has(entry.sha256) for entry in known.values()):
            return known
        folder = self.uploads.folder(upload_id)
        inspect_source(folder, foreign=True)
        found = self.uploads.digests(upload_id)
        files = {path.name: entry for path, entry in found.items()}
        if self.keys is not None:
            verify(read_keys(self.keys), digest_of_files(files), signature_beside(folder, signature))
        self._pins.pin_blobs(upload_id, [entry.sha256 for entry in files.values()])
        for path, entry in found.items():
            self._blobs.put(path, known=entry)
        self.uploads.close(upload_id, files)
        return files


def _source_of(request: Mapping[str, Any]) -> tuple[str, str]:
    """Which kind of source a request names, and its value."""
    return next((kind, str(request[kind])) for kind in SOURCES if request.get(kind) is not None)


@contextlib.contextmanager
def refusing(param: str) -> Iterator[None]:
    """Raise the library's errors as the server's, on the field of the source."""
    try:
        yield
    except ExpertsError as error:
        refused = translate(error)
        if not isinstance(error, BlobError):
            refused.param = refused.param or param
        raise refused from error
