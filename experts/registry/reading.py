"""Generations out of the blob store: experts and routers of one bundle, each checked when it is first read."""

import threading
from pathlib import Path

from experts.bundle_expert import ExpertWeights, check_expert, read_expert
from experts.bundle_files import read_router
from experts.bundle_manifest import EXPERT_FILES, ROUTER_FILES
from experts.checkpoint import Checkpoint
from experts.errors import MissingBlobError, TransitionError
from experts.registry.blobs import Blobs
from experts.registry.records import Files, Generation, RouterGeneration
from experts.routing import Router


class GenerationReader:
    """Reads what belongs to one bundle. Thread-safe; tensors are memory-mapped.

    Args:
        blobs: has the files.
        shared: the bundle's shared expert, which every expert must fit.
        build_id: of the bundle.
    """

    def __init__(self, blobs: Blobs, shared: Checkpoint, build_id: str) -> None:
        self._blobs = blobs
        self._shared = shared
        self._build_id = build_id
        self._checked: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def expert(self, generation: Generation) -> ExpertWeights:
        """One generation's tensors. Raises as `folder`."""
        return read_expert(self.folder(generation), generation.name, generation.number)

    def folder(self, generation: Generation) -> Path:
        """A folder with one generation's files, checked against the shared expert.

        Raises:
            TransitionError: it is not ready, or of another bundle.
            MissingBlobError, CorruptBlobError, BlobError: its files cannot be had.
            CorruptBundleError: they do not fit the shared expert.
        """
        name, number = generation.name, generation.number
        if generation.state != "ready" or generation.build_id != self._build_id:
            raise TransitionError(
                f"generation {number} of {name!r} is {generation.state}, for the bundle {generation.build_id}; "
                f"the bundle {self._build_id} serves none but its own that are ready"
            )
        folder = self._blobs.folder(_exactly(generation.files, EXPERT_FILES, f"{name}@{number}"))
        with self._lock:
            checked = (name, number) in self._checked
        if not checked:
            check_expert(folder, self._shared)
            with self._lock:
                self._checked.add((name, number))
        return folder

    def router(self, generation: RouterGeneration) -> Router:
        """A router, with its number.

        Raises:
            TransitionError: it is of another bundle.
            MissingBlobError, CorruptBlobError, BlobError: its files cannot be had.
            CorruptBundleError: they cannot be read.
        """
        if generation.build_id != self._build_id:
            raise TransitionError(f"router {generation.number} is of the bundle {generation.build_id}")
        files = _exactly(generation.files, ROUTER_FILES, f"router {generation.number}")
        return read_router(self._blobs.folder(files)).at_generation(generation.number)


def _exactly(files: Files, names: tuple[str, ...], what: str) -> Files:
    """Of a generation's files those that are read; others may lie beside them.

    Raises:
        MissingBlobError: the record does not list one.
    """
    missing = [name for name in names if name not in files]
    if missing:
        raise MissingBlobError(f"{what} has no {', '.join(missing)} in the catalogue")
    return {name: files[name] for name in names}
