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

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experts.bundle_change import changing
from experts.bundle_delta import BaseDelta
from experts.bundle_expert import ExpertWeights, check_expert, read_expert, summarise, write_expert
from experts.bundle_files import next_generation, open_shared, read_router, verify_files
from experts.bundle_loader import ExpertLoader
from experts.bundle_manifest import (
    BASE_DELTA_NAME,
    FORMAT_VERSION,
    SHARED_NAME,
    ExpertEntry,
    ExpertSource,
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
    CorruptBundleError,
    GenerationConflictError,
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
        with changing(self.path, self.manifest.build_id) as change:
            manifest = change.manifest
            current = manifest.experts.get(name)
            check_expected(name, current, expected_generation)
            generation = next_generation(self.path / "experts" / name, current.generation if current else 0)
            folder = expert_folder(name, generation)
            change.add(folder, lambda scratch: write_expert(scratch, compressed))
            check_expert(self.path / folder, self.shared)
            entry = ExpertEntry(
                generation=generation,
                state="active",
                routed=False,
                source=source,
                compression=compression or manifest.compression,
                summary=summarise(compressed, self.shared),
            )
            change.check_router_keeps(router)
            chosen = change.add_router(router) if router else manifest.router
            change.commit({**manifest.experts, name: entry}, chosen)
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
        with changing(self.path, self.manifest.build_id) as change:
            manifest = change.manifest
            current = manifest.experts.get(name)
            if current is None or current.state != "active":
                raise UnknownExpertError(f"{self.path} has no expert {name!r} to retire")
            entry = current.model_copy(update={"state": "retired", "routed": False})
            if router is None and current.routed:
                routed = Bundle(self.path, manifest).router()
                router = routed.without(name) if routed else None
                chosen = RouterEntry(generation=0, names=())
            else:
                chosen = manifest.router
            if router is not None:
                chosen = change.add_router(router)
            change.commit({**manifest.experts, name: entry}, chosen)
        return Bundle.open(self.path, verify=False)

    def revert_expert(self, name: str) -> "Bundle":
        """Make an expert, and the router, again what they were when this bundle was opened.

        Takes back a publication that could not be served. Its generation stays spent and its files stay.
        Does nothing where nothing was published. Returns the bundle opened anew.

        Args:
            name: the expert that was published since, or was not.

        Raises:
            GenerationConflictError: another expert has changed too, so that the router is another's as well.
            BundleError: the disk refuses.
        """
        with changing(self.path, self.manifest.build_id) as change:
            now, before = change.manifest, self.manifest
            if _others(now, name) != _others(before, name):
                raise GenerationConflictError(
                    f"expert {name!r} cannot be taken back, since another expert has changed too; retire it"
                )
            if (now.experts, now.router) != (before.experts, before.router):
                change.commit(before.experts, before.router)
        return Bundle.open(self.path, verify=False)

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


def _others(manifest: Manifest, name: str) -> dict[str, ExpertEntry]:
    """Every expert but one."""
    return {other: entry for other, entry in manifest.experts.items() if other != name}
