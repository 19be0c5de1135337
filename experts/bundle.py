"""The on-disk contract between building and serving: shared expert + exclusive vectors + router.

A bundle is a folder::

    manifest.json                                        what is in it, sha256 of every file
    base_delta.safetensors                               θ* − θ₀, so that LoRAs can join without the base
    shared/                                              an ordinary Hugging Face model folder
    experts/<name>/<generation>/expert.{safetensors,json}
    router/<generation>/router.{safetensors,json}

Generations are immutable. Publishing writes a new folder and then replaces manifest.json in one rename, so
a reader sees the old bundle or the new one, never a half. Writing a bundle anew is `bundle_writer`'s.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experts.bundle_delta import BaseDelta
from experts.bundle_expert import ExpertWeights, check_expert, read_expert, summarise, write_expert
from experts.bundle_files import add_folder, locked, next_generation, replace_file, verify_files
from experts.bundle_manifest import (
    BASE_DELTA_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARED_NAME,
    ExpertEntry,
    ExpertSource,
    FileEntry,
    Manifest,
    RouterEntry,
    check_expected,
    check_name,
    expert_folder,
    read_manifest,
    router_folder,
)
from experts.checkpoint import Checkpoint
from experts.compression import CompressedExpert, CompressionSpec
from experts.errors import (
    BundleError,
    CheckpointError,
    CorruptBundleError,
    GenerationConflictError,
    RoutingError,
    UnknownExpertError,
)
from experts.routing import Router, load_router

__all__ = ["FORMAT_VERSION", "Bundle", "ExpertWeights", "Manifest"]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, as its manifest was when it was opened; immutable.

    Attributes:
        path: the bundle's folder.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "Bundle":
        """Read the manifest and check everything it says against the files.

        With `verify` every live file is hashed (about a second per gigabyte); without, sizes, shapes and
        dtypes are still checked.

        Raises:
            BundleError: not a bundle, or of another format version.
            CorruptBundleError: a file is missing, truncated, changed, linked or does not fit; names it.
        """
        bundle = cls(path, read_manifest(path))
        manifest = bundle.manifest
        verify_files(path, manifest.files, manifest.live_files(), digests=verify)
        for name in manifest.active():
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
        try:
            return Checkpoint.open(self.shared_path)
        except CheckpointError as error:
            raise CorruptBundleError(f"{self.shared_path}: {error}") from error

    @cached_property
    def base_delta(self) -> BaseDelta:
        """θ* − θ₀, lazily."""
        return BaseDelta.open(self.path / BASE_DELTA_NAME)

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
        try:
            return load_router(self.path / router_folder(generation))
        except RoutingError as error:
            raise CorruptBundleError(str(error)) from error

    def publish_expert(
        self,
        compressed: CompressedExpert,
        name: str,
        router: Router | None,
        expected_generation: int | None,
        source: ExpertSource,
        compression: CompressionSpec | None = None,
    ) -> "Bundle":
        """Add an expert, or a new generation of one, and return the bundle opened anew.

        Args:
            compressed: its exclusive vector against *this* bundle's shared expert.
            name: see `check_name`.
            router: replaces the current router; None keeps it, and a new expert is then not routed to.
            expected_generation: None for a name that is not in use; else the generation to replace.
            source: where it came from.
            compression: how it was compressed; the bundle's own spec if not given.

        Raises:
            DuplicateExpertError: the name is in use and no generation was expected.
            UnknownExpertError: a generation was expected and the name is not in use.
            GenerationConflictError: another generation than the expected one is current, or the router does
                not know an expert that has become routed since it was fitted.
            BundleError: the name is not allowed, the router names other experts, or the disk refuses.
        """
        check_name(name)
        if name == self.manifest.name:
            raise BundleError(f"expert name {name!r} is the bundle's own name; choose another")
        with self._update() as manifest:
            current = manifest.experts.get(name)
            check_expected(name, current, expected_generation)
            generation = next_generation(self.path / "experts" / name, current.generation if current else 0)
            files = dict(manifest.files)
            folder = expert_folder(name, generation)
            files |= add_folder(self.path, folder, lambda scratch: write_expert(scratch, compressed))
            check_expert(self.path / folder, self.shared)
            entry = ExpertEntry(
                generation=generation,
                state="active",
                routed=False,
                source=source,
                compression=compression or manifest.compression,
                summary=summarise(compressed, self.shared),
            )
            _check_router_keeps(manifest, router)
            chosen = self._write_router(router, manifest, files) if router else manifest.router
            self._commit(manifest, {**manifest.experts, name: entry}, chosen, files)
        return Bundle.open(self.path, verify=False)

    def retire_expert(self, name: str, router: Router | None = None) -> "Bundle":
        """Take an expert out of service; its files stay. Returns the bundle opened anew.

        Args:
            name: an active expert.
            router: replaces the current router; None keeps the current one, choosing among the others.

        Raises:
            UnknownExpertError: no active expert of that name.
            BundleError: the router names an expert that is not active, or the disk refuses.
        """
        with self._update() as manifest:
            current = manifest.experts.get(name)
            if current is None or current.state != "active":
                raise UnknownExpertError(f"{self.path} has no expert {name!r} to retire")
            entry = current.model_copy(update={"state": "retired", "routed": False})
            files = dict(manifest.files)
            if router is None and current.routed:
                routed = Bundle(self.path, manifest).router()
                router = routed.without(name) if routed else None
                chosen = RouterEntry(generation=0, names=())
            else:
                chosen = manifest.router
            if router is not None:
                chosen = self._write_router(router, manifest, files)
            self._commit(manifest, {**manifest.experts, name: entry}, chosen, files)
        return Bundle.open(self.path, verify=False)

    @contextlib.contextmanager
    def _update(self) -> Iterator[Manifest]:
        """Hold the bundle's lock and give the manifest as it is now, not as it was when this was opened."""
        try:
            with locked(self.path):
                manifest = read_manifest(self.path)
                if manifest.build_id != self.manifest.build_id:
                    raise BundleError(f"{self.path} was rebuilt since it was opened; open it again")
                yield manifest
        except OSError as error:
            raise BundleError(f"{self.path} cannot be updated: {error}") from error

    def _write_router(self, router: Router, manifest: Manifest, files: dict[str, FileEntry]) -> RouterEntry:
        """Write a router as the next generation and list its files."""
        generation = next_generation(self.path / "router", manifest.router.generation)
        files |= add_folder(self.path, router_folder(generation), router.at_generation(generation).save)
        return RouterEntry(generation=generation, names=router.names)

    def _commit(
        self,
        manifest: Manifest,
        experts: Mapping[str, ExpertEntry],
        router: RouterEntry,
        files: Mapping[str, FileEntry],
    ) -> None:
        """Replace the manifest by one with these experts and this router."""
        active = {name for name, expert in experts.items() if expert.state == "active"}
        unknown = sorted(set(router.names) - active)
        if unknown:
            raise BundleError(
                f"the router chooses among {unknown}, which are not active experts; fit it anew"
            )
        routed = {
            name: expert.model_copy(update={"routed": name in router.names})
            for name, expert in experts.items()
        }
        updated = manifest.model_copy(update={"experts": routed, "router": router, "files": files})
        replace_file(self.path / MANIFEST_NAME, updated.model_dump_json(indent=1).encode() + b"\n")

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


def _check_router_keeps(manifest: Manifest, router: Router | None) -> None:
    """Refuse a router that was fitted before another registration and would undo it."""
    lost = sorted(set(manifest.router.names) - set(router.names)) if router else []
    if lost:
        raise GenerationConflictError(
            f"the router does not know {lost}, which are routed; fit it again and retry"
        )
