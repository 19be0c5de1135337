"""A bundle's first entry into a catalogue, and a bundle of the catalogue onto a disk."""

import contextlib
import shutil
from pathlib import Path

from experts.bundle import Bundle
from experts.bundle_files import locked, scratch_folder, sync_tree
from experts.bundle_manifest import (
    EXPERT_FILES,
    MANIFEST_NAME,
    ROUTER_FILES,
    FileEntry,
    Manifest,
    expert_folder,
    router_folder,
)
from experts.errors import BundleError, CatalogueError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import BundleRecord, Generation, RouterGeneration, new_id


def adopt(catalogue: Catalogue, blobs: Blobs, bundle: Bundle) -> int:
    """Put a bundle's experts and router into an empty catalogue and store; returns the revision.

    Generations keep their numbers. A catalogue that has the bundle already stays as it is.

    Raises:
        BundleError: a file of it cannot be read.
        TransitionError: the catalogue's bundle is another build.
        CatalogueError, BlobError: either cannot be used.
    """
    manifest = bundle.manifest
    experts = [_generation(bundle, name) for name in manifest.active()]
    router = bundle_router(bundle)
    record = BundleRecord(
        build_id=manifest.build_id, name=manifest.name, manifest=manifest.model_dump_json(indent=1)
    )
    files = [file for each in experts for file in each.files.items()]
    holder = new_id("adopt")
    entries = [entry for _, entry in files] + list(router.files.values() if router else ())
    catalogue.pin_blobs(holder, [entry.sha256 for entry in entries])
    try:
        for generation in experts:
            folder = bundle.path / expert_folder(generation.name, generation.number)
            for name, entry in generation.files.items():
                blobs.put(folder / name, known=entry)
        if router is not None:
            for name, entry in router.files.items():
                blobs.put(bundle.path / router_folder(router.number) / name, known=entry)
        return catalogue.adopt(record, experts, router)
    finally:
        with contextlib.suppress(CatalogueError):
            catalogue.unpin_blobs(holder)


def materialise(record: BundleRecord, blobs: Blobs, folder: Path) -> Bundle:
    """A bundle that the registry built, below `folder`; made once, opened ever after.

    Raises:
        BundleError: the record lists no files, or they are no bundle of that build.
        BlobError: a file cannot be had, or the disk refuses.
    """
    if not record.files:
        raise BundleError(f"the bundle {record.build_id} is not in the registry; it lies where it was built")
    target = folder / record.build_id
    if not (target / MANIFEST_NAME).is_file():
        with scratch_folder(target) as scratch:
            made = scratch / "bundle"
            blobs.place(record.files, made)
            sync_tree(made)
            with locked(folder):
                if not target.exists():
                    made.rename(target)
    bundle = Bundle.open(target, verify=False)
    if bundle.manifest.build_id != record.build_id:
        raise BundleError(f"{target} is the bundle {bundle.manifest.build_id}, not {record.build_id}")
    return bundle


def remove_superseded(folder: Path, keep: str) -> None:
    """Remove materialised bundles that are not served any more; what a reader has open stays readable."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.is_dir() and child.name != keep and not child.name.startswith("."):
            shutil.rmtree(child, ignore_errors=True)


def bundle_generations(bundle: Bundle) -> list[Generation]:
    """The experts of a bundle as generations of a catalogue."""
    return [_generation(bundle, name) for name in bundle.manifest.active()]


def _generation(bundle: Bundle, name: str) -> Generation:
    manifest = bundle.manifest
    entry = manifest.experts[name]
    return Generation(
        name=name,
        number=entry.generation,
        build_id=manifest.build_id,
        state="ready",
        files=_files(manifest, expert_folder(name, entry.generation), EXPERT_FILES),
        source=entry.source,
        compression=entry.compression,
        summary=entry.summary,
    )


def bundle_router(bundle: Bundle) -> RouterGeneration | None:
    """The router of a bundle as a generation of a catalogue; None where it has none."""
    manifest = bundle.manifest
    number = manifest.router.generation
    if not number:
        return None
    return RouterGeneration(
        number=number,
        build_id=manifest.build_id,
        profiles={name: manifest.experts[name].generation for name in manifest.router.names},
        files=_files(manifest, router_folder(number), ROUTER_FILES),
        reason="built",
    )


def _files(manifest: Manifest, folder: str, names: tuple[str, ...]) -> dict[str, FileEntry]:
    return {name: manifest.files[f"{folder}/{name}"] for name in names}
