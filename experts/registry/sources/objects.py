"""Files in an object store, through fsspec. Where the store is, and its credentials, are the server's to say."""

import contextlib
import importlib
import time
from collections.abc import Iterator
from typing import Any

from experts.errors import SourceUnavailableError
from experts.registry.sources.policy import FetchPolicy, Location
from experts.registry.sources.remote import Remote, RemoteFile

_CHUNK = 4 * 2**20


class Objects(Remote):
    """Reads what lies in one bucket.

    Args:
        scheme: an object store's.

    Raises:
        SourceUnavailableError: the package for that store is not installed, or its options are wrong.
    """

    def __init__(self, policy: FetchPolicy, deadline: float, scheme: str) -> None:
        self._policy = policy
        self._deadline = deadline
        try:
            # A connection of its own, so that it can be closed and no thread shares it.
            self._store: Any = importlib.import_module("fsspec").filesystem(
                scheme, skip_instance_cache=True, use_listings_cache=False, **policy.options
            )
        except (ImportError, ValueError, TypeError) as error:
            raise SourceUnavailableError(f"{scheme} URLs cannot be read here: {error}") from error

    def close(self) -> None:
        """Nothing stays open."""

    @contextlib.contextmanager
    def open(self, location: Location) -> Iterator[RemoteFile | None]:
        """One object; None where there is none.

        Raises:
            SourceUnavailableError: the store cannot be read.
        """
        path = f"{location.host}{location.path}"
        try:
            details = self._store.info(path)
            file = (
                None
                if details.get("type") == "directory"
                else self._store.open(path, "rb", block_size=_CHUNK)
            )
        except (FileNotFoundError, PermissionError):
            yield None
            return
        except Exception as error:  # whatever the store's own client raises
            raise SourceUnavailableError(
                f"{location} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if file is None:
            yield None
            return
        with file:
            yield RemoteFile(details.get("size"), self._chunks(location, file))

    def _chunks(self, location: Location, file: Any) -> Iterator[bytes]:
        while True:
            if time.monotonic() > self._deadline:
                raise SourceUnavailableError(
                    f"fetching {location} took longer than {self._policy.seconds:g} s"
                )
            try:
                chunk = file.read(_CHUNK)
            except Exception as error:  # whatever the store's own client raises
                raise SourceUnavailableError(f"{location} cannot be read: {error}") from error
            if not chunk:
                return
            yield bytes(chunk)
