"""A fine-tune from a URL into a folder: the known files of the folder that the URL names, streamed and counted.

A URL names a folder, whose known files are asked for one by one, or one file in it: a `.gguf` alone, or a
`.safetensors`, which means the folder that it is in. Nothing is listed and nothing else is ever read.
"""

import contextlib
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from experts.checkpoint.storage import MAX_JSON_BYTES, read_json
from experts.errors import CheckpointError, SourceTooLargeError, SourceUnavailableError
from experts.registry.sources.addresses import Resolver, system_resolver
from experts.registry.sources.disk import disk
from experts.registry.sources.names import CONFIGS, SIGNATURE_NAME, check_file_name, is_accepted
from experts.registry.sources.objects import Objects
from experts.registry.sources.policy import WEB, FetchPolicy, Location
from experts.registry.sources.remote import Remote
from experts.registry.sources.web import Web

Progress = Callable[[str, int], None]
"""(file name, bytes of all files so far)."""

_WEIGHTS = {"expert.json": "expert", "adapter_config.json": "adapter_model", "config.json": "model"}
_SMALL = 65536


def _silent(name: str, nbytes: int) -> None:
    """Nobody wants to know."""


def fetch(
    url: str,
    target: Path,
    policy: FetchPolicy,
    progress: Progress = _silent,
    *,
    resolve: Resolver = system_resolver,
    trust: ssl.SSLContext | None = None,
) -> Path:
    """Fetch what a URL names into an empty folder.

    Args:
        target: an existing folder.
        progress: called after each chunk.
        resolve: a host's addresses.
        trust: certificates to trust; the system's where None.

    Returns:
        The folder.

    Raises:
        SourceError: the policy does not allow the URL, an address behind it, or a redirect.
        SourceTooLargeError: more than the policy's bytes.
        SourceUnavailableError: no answer, none in time, or none of the known files is there.
        CheckpointError: an index names files that no model has.
        StorageFullError, BlobError: the disk refuses.
    """
    location = policy.check(url)
    deadline = time.monotonic() + policy.seconds
    remote: Remote
    if location.scheme in WEB:
        remote = Web(policy, deadline, resolve, trust)
    else:
        remote = Objects(policy, deadline, location.scheme)
    with contextlib.closing(remote):
        _Fetch(remote, target, policy, progress).all_of(location)
    return target


class _Fetch:
    """One fetch under way."""

    def __init__(self, remote: Remote, target: Path, policy: FetchPolicy, progress: Progress) -> None:
        self._remote = remote
        self._target = target
        self._policy = policy
        self._progress = progress
        self._nbytes = 0

    def all_of(self, location: Location) -> None:
        """Everything that the URL means."""
        folder, _, last = location.path.rpartition("/")
        if last.endswith((".safetensors", ".gguf", ".json")):
            check_file_name(last)
            location = Location(location.scheme, location.host, location.port, folder)
            if last.endswith(".gguf"):
                self._require(location, last)
                self._get(location, SIGNATURE_NAME, _SMALL)
                return
        # An adapter's or expert's folder may hold its base's config.json too.
        for config in CONFIGS:
            if self._get(location, config, MAX_JSON_BYTES):
                self._weights(location, _WEIGHTS[config])
                self._get(location, SIGNATURE_NAME, _SMALL)
                return
        raise SourceUnavailableError(
            f"{location} has none of {', '.join(CONFIGS)}; name the folder that a fine-tune was saved to"
        )

    def _weights(self, location: Location, stem: str) -> None:
        """The file of weights, or the shards that an index names."""
        if self._get(location, f"{stem}.safetensors", None):
            return
        index = f"{stem}.safetensors.index.json"
        if stem == "expert" or not self._get(location, index, MAX_JSON_BYTES):
            raise SourceUnavailableError(
                f"{location} has no {stem}.safetensors; pickled weights are not read"
            )
        shards = read_json(self._target / index).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"{index} has no weight_map; save the model again")
        names = {str(shard) for shard in shards.values()}
        for name in sorted(names):
            if not is_accepted(name) or not name.startswith(f"{stem}-"):
                raise CheckpointError(f"{index} names the shard {name[:128]!a}, which no model has")
        for name in sorted(names):
            self._require(location, name)

    def _require(self, location: Location, name: str) -> None:
        if not self._get(location, name, None):
            raise SourceUnavailableError(f"{location} has no {name}")

    def _get(self, location: Location, name: str, limit: int | None) -> bool:
        """Fetch one file; false where there is none."""
        with self._remote.open(location.child(name)) as found:
            if found is None:
                return False
            self._check(name, found.nbytes or 0, limit)
            size = 0
            with disk(self._target), (self._target / name).open("wb") as file:
                for chunk in found.chunks:
                    size += len(chunk)
                    self._check(name, size, limit)
                    file.write(chunk)
                    self._progress(name, self._nbytes + size)
                file.flush()
                os.fsync(file.fileno())
            if found.nbytes is not None and size != found.nbytes:
                raise SourceUnavailableError(f"{name} ended after {size} of {found.nbytes} bytes; try again")
            self._nbytes += size
        return True

    def _check(self, name: str, size: int, limit: int | None) -> None:
        if limit is not None and size > limit:
            raise SourceTooLargeError(f"{name} is larger than {limit} bytes, which no such file is")
        if self._nbytes + size > self._policy.max_bytes:
            raise SourceTooLargeError(
                f"the source is larger than {self._policy.max_bytes} bytes (max_source_bytes)"
            )
