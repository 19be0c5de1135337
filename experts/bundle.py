"""The on-disk contract between building and serving: shared expert + exclusive vectors + router.

A bundle is a folder::

    manifest.json                                        what is in it, sha256 of every file
    base_delta.safetensors                               θ* − θ₀, so that LoRAs can join without the base
    shared/                                              an ordinary Hugging Face model folder
    experts/<name>/<generation>/expert.{safetensors,json}
    router/<generation>/router.{safetensors,json}

A bundle is immutable: what comes, changes and goes while it is served is the registry's (`experts.registry`).
Writing one is `bundle_writer`'s.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experts.bundle_delta import BaseDelta
from experts.bundle_expert import ExpertWeights, check_expert, read_expert
from experts.bundle_files import open_shared, read_router, verify_files
from experts.bundle_loader import ExpertLoader
from experts.bundle_manifest import (
    BASE_DELTA_NAME,
    FORMAT_VERSION,
    SHARED_NAME,
    ExpertEntry,
    Manifest,
    check_name,
    expert_folder,
    read_manifest,
    router_folder,
)
from experts.checkpoint import Checkpoint
from experts.errors import (
    CorruptBundleError,
    UnknownExpertError,
)
from experts.routing import Router

__all__ = ["FORMAT_VERSION", "Bundle", "ExpertLoader", "ExpertWeights", "Manifest", "check_name"]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, as its manifest was when it was opened; immutable.

    Attributes:
        path: the bundle's folder.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, verify: bool = True, *, lazy: bool = False) -> "Bundle":
        """Read the manifest and check everything it says against the files.

        With `verify` every live file is hashed (about a second per gigabyte); without, sizes, shapes and
        dtypes are still checked. With `lazy` no expert's file is read, so that opening takes as long with
        hundreds of experts as with a few: only presence and size are checked, the rest by `loader` in time.

        Raises:
            BundleError: not a bundle, or of another format version.
            CorruptBundleError: a file is missing, truncated, changed, linked or does not fit; names it.
        """
        bundle = cls(path, read_manifest(path))
        manifest = bundle.manifest
        later = frozenset(manifest.expert_files() if lazy else ())
        now = [file for file in manifest.live_files() if file not in later]
        verify_files(path, manifest.files, now, digests=verify)
        verify_files(path, manifest.files, later, digests=False)
        for name in () if lazy else manifest.active():
            check_expert(path / expert_folder(name, manifest.experts[name].generation), bundle.shared)
        bundle.base_delta.check(bundle.shared)
        bundle._check_router()
        return bundle

    @property
    def shared_path(self) -> Path:
        """The shared expert: a Hugging Face folder with tokenizer and chat template."""
        return self.path / SHARED_NAME

    @cached_property
    def shared(self) -> Checkpoint:
        """The shared expert's tensors, lazily.

        Raises:
            CorruptBundleError: it is not a readable checkpoint.
        """
        return open_shared(self.shared_path)

    @cached_property
    def base_delta(self) -> BaseDelta:
        """θ* − θ₀, lazily."""
        return BaseDelta.open(self.path / BASE_DELTA_NAME)

    @property
    def name(self) -> str:
        """By which clients ask for routed answers."""
        return self.manifest.name

    def generations(self) -> dict[str, int]:
        """Active experts and their current generations."""
        return {name: self.manifest.experts[name].generation for name in self.expert_names()}

    def expert_names(self) -> tuple[str, ...]:
        """Names of the active experts, sorted."""
        return self.manifest.active()

    def expert(self, name: str) -> ExpertWeights:
        """The current generation's tensors.

        Raises:
            UnknownExpertError: no active expert of that name.
            CorruptBundleError: its file cannot be read.
        """
        entry = self.entry(name)
        folder = self.path / expert_folder(name, entry.generation)
        return read_expert(folder, name, entry.generation)

    def loader(self, *, verify: bool = True) -> ExpertLoader:
        """Reads experts by generation, each checked when it is first wanted, and hashed with `verify`."""
        return ExpertLoader(self.path, self.manifest, self.shared, verify=verify)

    def entry(self, name: str) -> ExpertEntry:
        """What the manifest says of an active expert.

        Raises:
            UnknownExpertError: no active expert of that name.
        """
        entry = self.manifest.experts.get(name)
        if entry is None or entry.state != "active":
            raise UnknownExpertError(
                f"{self.path} has no expert {name!r}; it has {', '.join(self.expert_names()) or 'none'}"
            )
        return entry

    def router(self) -> Router | None:
        """The current router; None if requests must name their experts.

        Raises:
            CorruptBundleError: its files cannot be read.
        """
        generation = self.manifest.router.generation
        if not generation:
            return None
        return read_router(self.path / router_folder(generation))

    def _check_router(self) -> None:
        """Raise unless the router and the manifest name the same, active experts."""
        router = self.router()
        listed = self.manifest.router.names
        if (router.names if router else ()) != listed:
            raise CorruptBundleError(f"{self.path}: the router's experts differ from the manifest's {listed}")
        unknown = sorted(set(listed) - set(self.expert_names()))
        if unknown:
            raise CorruptBundleError(
                f"{self.path}: the router chooses among {unknown}, which are not active experts"
            )
