"""The next state of a bundle in the making: one writer at a time, new folders first, then one rename."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experts.bundle_files import add_folder, locked, next_generation, replace_file
from experts.bundle_manifest import (
    MANIFEST_NAME,
    ExpertEntry,
    FileEntry,
    Manifest,
    RouterEntry,
    read_manifest,
    router_folder,
)
from experts.errors import BundleError, GenerationConflictError
from experts.routing import Router


@dataclass
class Change:
    """What a bundle becomes when `commit` is called, and not before; made by `changing`.

    Attributes:
        manifest: as it is on disk now, not as it was when somebody opened the bundle.
    """

    path: Path
    manifest: Manifest
    _files: dict[str, FileEntry] = field(init=False)

    def __post_init__(self) -> None:
        self._files = dict(self.manifest.files)

    def add(self, folder: str, fill: Callable[[Path], None]) -> None:
        """Write a new folder and list its files."""
        self._files |= add_folder(self.path, folder, fill)

    def add_router(self, router: Router) -> RouterEntry:
        """Write a router as the next generation and list its files."""
        generation = next_generation(self.path / "router", self.manifest.router.generation)
        self.add(router_folder(generation), router.at_generation(generation).save)
        return RouterEntry(generation=generation, names=router.names)

    def check_router_keeps(self, router: Router | None) -> None:
        """Refuse a router that was fitted before another registration and would undo it.

        Raises:
            GenerationConflictError: it does not know an expert that is routed.
        """
        lost = sorted(set(self.manifest.router.names) - set(router.names)) if router else []
        if lost:
            raise GenerationConflictError(
                f"the router does not know {lost}, which are routed; fit it again and retry"
            )

    def commit(self, experts: Mapping[str, ExpertEntry], router: RouterEntry) -> None:
        """Replace the manifest by one with these experts and this router.

        Raises:
            BundleError: the router names an expert that is not active.
        """
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
        updated = self.manifest.model_copy(
            update={"experts": routed, "router": router, "files": dict(self._files)}
        )
        replace_file(self.path / MANIFEST_NAME, updated.model_dump_json(indent=1).encode() + b"\n")


@contextlib.contextmanager
def changing(path: Path, build_id: str) -> Iterator[Change]:
    """Hold the bundle's lock for one change.

    Raises:
        BundleError: the bundle was rebuilt since `build_id`, or the disk refuses.
    """
    try:
        with locked(path):
            manifest = read_manifest(path)
            if manifest.build_id != build_id:
                raise BundleError(f"{path} was rebuilt since it was opened; open it again")
            yield Change(path, manifest)
    except OSError as error:
        raise BundleError(f"{path} cannot be updated: {error}") from error
