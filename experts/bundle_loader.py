"""Single generations of experts off an opened bundle, read when they are wanted and checked the first time."""

from pathlib import Path

from experts.bundle_expert import ExpertWeights, check_expert, read_expert
from experts.bundle_files import verify_file
from experts.bundle_manifest import EXPERT_FILES, Manifest, expert_folder, read_manifest
from experts.checkpoint import Checkpoint
from experts.errors import UnknownExpertError


class ExpertLoader:
    """Reads any generation whose files the bundle still has, current or not. Used by one thread at a time.

    Tensors are memory-mapped: a page is read when it is touched. What was published since the bundle was
    opened is found too, as long as nobody has rebuilt the bundle.

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
            UnknownExpertError: the bundle has no such generation, or is another bundle by now.
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
            self._reread(folder, paths)
        for path in paths:
            verify_file(self._path / path, self._manifest.files[path], digests=self._verify)
        check_expert(self._path / folder, self._shared)

    def _reread(self, folder: str, paths: list[str]) -> None:
        found = read_manifest(self._path)
        if found.build_id != self._manifest.build_id:
            raise UnknownExpertError(
                f"{self._path} was rebuilt since it was opened; {folder} of the old one is gone: "
                "restart the server"
            )
        if any(path not in found.files for path in paths):
            raise UnknownExpertError(f"{self._path} has no {folder}")
        self._manifest = found
