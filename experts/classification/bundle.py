"""A classifier bundle: shared encoder + exclusive vectors + heads + router.

It is a folder::

    manifest.json                          what is in it, sha256 of every file
    shared/                                an ordinary Hugging Face encoder with its tokenizer
    experts/<name>/expert.{safetensors,json}   exclusive vector: factors of matrices and embeddings, and
                                           biases and norms exactly
    experts/<name>/head.safetensors        the head over the expert's own label set
    router/router.{safetensors,json}

Nothing of the true task is needed to answer: encoder weights, biases, norms and head all follow the gates. The
encoder is θ* + Σ g_t·v_t, the label set and head are those of the largest gate. Written once, by `build.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from experts.bundle_expert import ExpertWeights, check_expert, read_expert
from experts.bundle_files import open_shared, read_router, verify_files
from experts.bundle_manifest import SHARED_NAME
from experts.checkpoint import Checkpoint
from experts.classification.families import Family, check_head, family_of
from experts.classification.manifest import (
    HEAD_FILE,
    ROUTER_FOLDER,
    ClassifierEntry,
    ClassifierManifest,
    expert_folder,
    read_manifest,
)
from experts.errors import CheckpointError, CorruptBundleError, UnknownExpertError
from experts.routing import Router


@dataclass(frozen=True)
class ClassifierBundle:
    """An opened classifier bundle; immutable."""

    path: Path
    manifest: ClassifierManifest

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "ClassifierBundle":
        """Read the manifest and check everything it says against the files; with `verify` hash them too.

        Raises:
            BundleError: not a classifier bundle, or of another format version.
            CorruptBundleError: a file is missing, truncated, changed, linked or does not fit; names it.
        """
        bundle = cls(path, read_manifest(path))
        verify_files(path, bundle.manifest.files, bundle.manifest.live_files(), digests=verify)
        for name in bundle.expert_names():
            check_expert(path / expert_folder(name), bundle.shared)
            bundle._check_head(name)
        bundle._check_router()
        return bundle

    @property
    def shared_path(self) -> Path:
        """The shared encoder: a Hugging Face folder with tokenizer."""
        return self.path / SHARED_NAME

    @cached_property
    def shared(self) -> Checkpoint:
        """The shared encoder's tensors, lazily.

        Raises:
            CorruptBundleError: it is not a readable checkpoint.
        """
        return open_shared(self.shared_path)

    @property
    def family(self) -> Family:
        """The encoder's architecture.

        Raises:
            CorruptBundleError: it is none that is supported.
        """
        try:
            return family_of(self.shared.config, self.shared_path)
        except CheckpointError as error:
            raise CorruptBundleError(str(error)) from error

    def expert_names(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted(self.manifest.experts))

    def entry(self, name: str) -> ClassifierEntry:
        """What the manifest says of an expert.

        Raises:
            UnknownExpertError: no expert of that name.
        """
        entry = self.manifest.experts.get(name)
        if entry is None:
            raise UnknownExpertError(
                f"{self.path} has no expert {name!r}; it has {', '.join(self.expert_names())}"
            )
        return entry

    def expert(self, name: str) -> ExpertWeights:
        """An expert's exclusive vector. Raises as `entry`, and CorruptBundleError."""
        self.entry(name)
        return read_expert(self.path / expert_folder(name), name, 1)

    def head(self, name: str) -> Mapping[str, Tensor]:
        """An expert's head, float32. Raises as `entry`, and CorruptBundleError."""
        self.entry(name)
        path = self.path / expert_folder(name) / HEAD_FILE
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CorruptBundleError(
                f"{path}: not readable ({error}); restore or rebuild the bundle"
            ) from error

    def router(self) -> Router | None:
        """The router; None if requests must name their experts.

        Raises:
            CorruptBundleError: its files cannot be read.
        """
        if not self.manifest.router.generation:
            return None
        return read_router(self.path / ROUTER_FOLDER)

    def _check_head(self, name: str) -> None:
        path = self.path / expert_folder(name) / HEAD_FILE
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                dtypes = {str(file.get_slice(key).get_dtype()) for key in shapes}
        except (OSError, SafetensorError) as error:
            raise CorruptBundleError(
                f"{path}: not readable ({error}); restore or rebuild the bundle"
            ) from error
        hidden = int(self.shared.config["hidden_size"])
        problem = check_head(self.family, shapes, hidden, len(self.manifest.experts[name].labels))
        if problem is None and dtypes != {"F32"}:
            problem = f"the head is {sorted(dtypes)}, not F32"
        if problem:
            raise CorruptBundleError(f"{path}: {problem}; restore or rebuild the bundle")

    def _check_router(self) -> None:
        router, listed = self.router(), self.manifest.router.names
        if (router.names if router else ()) != listed or not set(listed) <= set(self.manifest.experts):
            raise CorruptBundleError(
                f"{self.path}: the router's experts differ from the manifest's {listed}; rebuild the bundle"
            )
