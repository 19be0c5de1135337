"""Single generations of experts off an opened bundle, read when they are wanted and checked the first time."""

from pathlib import Path

from experts.bundle_expert import ExpertWeights, check_expert, read_expert
from experts.bundle_files import verify_file
from experts.bundle_manifest import EXPERT_FILES, Manifest, expert_folder
from experts.checkpoint import Checkpoint
from experts.errors import UnknownExpertError


class ExpertLoader:
    """Reads any generation whose files the bundle has, current or not. Used by one thread at a time.

    Tensors are memory-mapped: a page is read when it is touched.

    Args:
        manifest: as it was when the bundle was opened.
        shared: the shared expert, which every expert must fit.
        verify: hash a generation's files before they are first used.
    """

    def __init__(self, path: Path, manifest: Manifest, shared: Checkpoint, *, verify: bool = True) -> None:
        self._path = path
        self._manifest = manifest
        self._shared = shared
        self._verify = verify
        self._checked: set[str] = set()

    def load(self, name: str, generation: int) -> ExpertWeights:
        """One generation's tensors.

        Raises:
            UnknownExpertError: the bundle has no such generation.
            CorruptBundleError: a file of it is missing, changed or linked, or does not fit the shared expert.
        """
        folder = expert_folder(name, generation)
        if folder not in self._checked:
            self._check(folder)
            self._checked.add(folder)
        return read_expert(self._path / folder, name, generation)

    def _check(self, folder: str) -> None:
        paths = [f"{folder}/{file}" for file in EXPERT_FILES]
        if any(path not in self._manifest.files for path in paths):
            raise UnknownExpertError(f"{self._path} has no {folder}")
        for path in paths:
            verify_file(self._path / path, self._manifest.files[path], digests=self._verify)
        check_expert(self._path / folder, self._shared)
