"""Write a whole bundle: under a hidden name beside its place, flushed, then renamed into it.

A process killed half-way leaves nothing at the target; the hidden folder is removed by the next build.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from experts.bundle_delta import BaseDelta, BaseDeltaWriter
from experts.bundle_expert import summarise, write_expert
from experts.bundle_files import digest, list_files, scratch_folder, sync, sync_tree
from experts.bundle_manifest import (
    BASE_DELTA_NAME,
    MANIFEST_NAME,
    SHARED_NAME,
    BaseInfo,
    ExpertEntry,
    ExpertSource,
    Manifest,
    MergeInfo,
    RouterEntry,
    check_name,
    expert_folder,
    router_folder,
)
from experts.checkpoint import Checkpoint, write_checkpoint
from experts.compression import CompressedExpert, CompressionSpec
from experts.errors import BundleError, DuplicateExpertError
from experts.factors import Delta
from experts.routing import Router


@contextlib.contextmanager
def new_bundle(
    target: Path, name: str, compression: CompressionSpec, *, overwrite: bool = False
) -> Iterator["BundleWriter"]:
    """A writer for one bundle at `target`; whatever it has not committed in the end is removed.

    Args:
        target: the bundle's folder to be.
        name: the bundle's name, by which clients ask for routed answers; see `check_name`.
        compression: how its experts are compressed.
        overwrite: replace a bundle that is there. Anything else that is there is refused in any case.

    Raises:
        BundleError: the name is not allowed, the target is taken, or the disk refuses.
    """
    check_name(name, "bundle")
    target = target.absolute()
    check_target(target, overwrite=overwrite)
    with scratch_folder(target) as folder:
        try:
            yield BundleWriter(folder, target, name, compression, overwrite)
        except OSError as error:
            raise BundleError(f"cannot write {target}: {error}") from error


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise unless a bundle may be written at `target`.

    Raises:
        BundleError: it exists and is not a bundle, or is one and `overwrite` is false.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not (target / MANIFEST_NAME).is_file() or target.is_symlink():
        raise BundleError(f"{target} exists and is not a bundle; choose another place")
    if not overwrite:
        raise BundleError(f"{target} exists; choose another place or pass --overwrite")


@dataclass
class BundleWriter:
    """Fills a scratch folder in order: shared expert, then experts and router, then commit.

    Attributes:
        folder: the scratch folder; nothing outside the writer may depend on it after `commit`.
    """

    folder: Path
    target: Path
    name: str
    compression: CompressionSpec
    overwrite: bool
    _experts: dict[str, ExpertEntry] = field(default_factory=dict)
    _router: RouterEntry = field(default_factory=lambda: RouterEntry(generation=0, names=()))

    @property
    def shared_path(self) -> Path:
        """The shared expert's folder, usable once `write_shared` has returned."""
        return self.folder / SHARED_NAME

    def write_shared(
        self, base: Checkpoint, deltas: Iterable[tuple[str, Delta | None]]
    ) -> tuple[Checkpoint, BaseDelta]:
        """Stream θ₀ + (θ* − θ₀) into shared/ and the difference into base_delta.safetensors."""
        path = self.folder / BASE_DELTA_NAME
        with BaseDeltaWriter(path) as writer:
            write_checkpoint(base, writer.tee(deltas, base), self.shared_path)
        return Checkpoint.open(self.shared_path), BaseDelta.open(path)

    def add_expert(
        self,
        name: str,
        compressed: CompressedExpert,
        source: ExpertSource,
        shared: Checkpoint,
        compression: CompressionSpec | None = None,
    ) -> None:
        """Write the first generation of an expert; `compression` is its own where it is not the bundle's.

        Raises:
            BundleError: the name is not allowed or is the bundle's own.
            DuplicateExpertError: it is there already.
        """
        check_name(name)
        if name == self.name:
            raise BundleError(f"expert name {name!r} is the bundle's own name; choose another")
        if name in self._experts:
            raise DuplicateExpertError(f"expert {name!r} is given twice")
        folder = self.folder / expert_folder(name, 1)
        folder.mkdir(parents=True)
        write_expert(folder, compressed)
        self._experts[name] = ExpertEntry(
            generation=1,
            state="active",
            routed=False,
            source=source,
            compression=compression or self.compression,
            summary=summarise(compressed, shared),
        )

    def set_router(self, router: Router) -> None:
        """Write the first generation of the router."""
        folder = self.folder / router_folder(1)
        folder.mkdir(parents=True)
        router.at_generation(1).save(folder)
        self._router = RouterEntry(generation=1, names=router.names)

    def commit(self, base: BaseInfo, merge: MergeInfo) -> None:
        """Write the manifest, flush everything and rename the bundle into its place."""
        unknown = sorted(set(self._router.names) - set(self._experts))
        if unknown:
            raise BundleError(f"the router chooses among {unknown}, which are not in the bundle")
        manifest = Manifest(
            name=self.name,
            build_id=secrets.token_hex(16),
            base=base,
            merge=merge,
            compression=self.compression,
            experts={
                name: entry.model_copy(update={"routed": name in self._router.names})
                for name, entry in self._experts.items()
            },
            router=self._router,
            files={path: digest(self.folder / path) for path in list_files(self.folder)},
        )
        (self.folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync_tree(self.folder)
        self._rename()

    def _rename(self) -> None:
        """Swap the finished folder in; the bundle that it replaces is kept until the new one is there."""
        check_target(self.target, overwrite=self.overwrite)
        replaced = self.target.with_name(f".{self.target.name}.replaced-{secrets.token_hex(4)}")
        if self.target.exists():
            os.rename(self.target, replaced)
        os.rename(self.folder, self.target)
        sync(self.target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
