"""Opens what a server keeps its experts in: catalogue, blobs, and the bundle that they belong to."""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.bundle import Bundle
from experts.errors import BundleError, CatalogueError
from experts.registry.adopting import adopt, materialise, remove_superseded
from experts.registry.blobs import Blobs, writable
from experts.registry.catalogue import Catalogue
from experts.registry.records import BundleRecord, Snapshot
from experts.registry.work import StoreAt
from service.registrar.family import CatalogueFamily
from service.settings import Settings

_log = logging.getLogger(__name__)

_CATALOGUE = "catalogue.sqlite"
_BLOBS = "blobs"
_BUNDLES = "bundles"
_CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Registry:
    """An opened registry.

    Attributes:
        store: where other processes of this machine find the blobs.
        state: the folder of what is neither in the catalogue nor in the blobs: uploads, caches, built bundles.
        family: what is to be served now.
        writable: changes can be made.
        temporary: the folder goes with this process; nothing in it was there before.
    """

    catalogue: Catalogue
    blobs: Blobs
    store: StoreAt
    state: Path
    own: Bundle
    family: CatalogueFamily
    writable: bool
    temporary: bool = False

    def family_of(self, snapshot: Snapshot) -> CatalogueFamily:
        """What a snapshot says, with its bundle on this machine's disk. Blocks.

        Raises:
            BundleError: the bundle is neither the server's own nor in the registry.
            BlobError: it cannot be brought here.
        """
        bundle = self.bundle_of(snapshot.bundle)
        return CatalogueFamily(bundle, snapshot, self.catalogue, self.blobs)

    def bundle_of(self, record: BundleRecord) -> Bundle:
        """A bundle on this machine's disk, fetched if need be. Blocks. Raises as `family_of`."""
        return _bundle_of(record, self.own, self.blobs, self.state)

    def close(self) -> None:
        """Close connections; what is temporary goes."""
        self.catalogue.close()
        self.blobs.close()
        if self.temporary:
            shutil.rmtree(self.state, ignore_errors=True)


def state_folder(settings: Settings) -> Path:
    """Where the registry keeps what has no place of its own."""
    return settings.state_dir or settings.bundle / "registry"


def catalogue_url(settings: Settings) -> str:
    """The database's URL."""
    if settings.catalogue is not None:
        return settings.catalogue.get_secret_value()
    return f"sqlite:///{(state_folder(settings) / _CATALOGUE).absolute()}"


def open_blobs(settings: Settings) -> Blobs:
    """The blob store of the settings.

    Raises:
        BlobError: its URL or options make no sense.
        ValueError: the options are no JSON object.
    """
    return _opened(_store(settings))


def _store(settings: Settings) -> StoreAt:
    state = state_folder(settings)
    return StoreAt(settings.blobs or str(state / _BLOBS), state / _CACHE, _blob_options(settings))


def _opened(store: StoreAt) -> Blobs:
    return Blobs.open(store.url, store.cache, store.options)


def open_registry(settings: Settings) -> Registry:
    """Open, or begin, the registry of the settings, and find what is to be served. Blocks.

    A catalogue that knows no bundle adopts the settings' own. Where neither a catalogue is there nor one can be
    made, since the disk cannot be written, a temporary one stands in, and nothing can be changed.

    Raises:
        BundleError: the bundle is broken, or another one than the catalogue serves.
        CatalogueError, BlobError: the database or the store cannot be used.
        ValueError: a setting cannot be used.
    """
    own = Bundle.open(settings.bundle, lazy=True)
    state = state_folder(settings)
    can_write = writable(state)
    local = settings.catalogue is None
    if local and not can_write and not (state / _CATALOGUE).is_file():
        _log.warning("%s cannot be written: experts are served as they are, and none can be changed", state)
        return _open_temporary(own)
    catalogue = Catalogue.open(catalogue_url(settings), read_only=local and not can_write)
    with contextlib.ExitStack() as undo:
        undo.callback(catalogue.close)
        store = _store(settings)
        blobs = _opened(store)
        undo.callback(blobs.close)
        family = _family(catalogue, blobs, own, state)
        remove_superseded(state / _BUNDLES, family.build_id)
        undo.pop_all()
    changes = catalogue.writable and (can_write or settings.blobs is not None)
    if not changes:
        _log.warning(
            "the registry cannot be written: experts are served as they are, and none can be changed"
        )
    return Registry(catalogue, blobs, store, state, own, family, changes)


def _open_temporary(own: Bundle) -> Registry:
    """A registry for one process's life, of the bundle as it was built."""
    state = Path(tempfile.mkdtemp(prefix="twinserve-registry-"))
    try:
        catalogue = Catalogue.open(f"sqlite:///{state / _CATALOGUE}")
        store = StoreAt(str(state / _BLOBS), state / _CACHE)
        blobs = _opened(store)
        family = _family(catalogue, blobs, own, state)
        return Registry(catalogue, blobs, store, state, own, family, writable=False, temporary=True)
    except BaseException:
        shutil.rmtree(state, ignore_errors=True)
        raise


def _family(catalogue: Catalogue, blobs: Blobs, own: Bundle, state: Path) -> CatalogueFamily:
    snapshot = catalogue.snapshot()
    if snapshot is None:
        adopt(catalogue, blobs, own)
        snapshot = catalogue.snapshot()
    if snapshot is None:
        raise CatalogueError("the catalogue took the bundle and does not know it; is its database broken?")
    return CatalogueFamily(_bundle_of(snapshot.bundle, own, blobs, state), snapshot, catalogue, blobs)


def _bundle_of(wanted: BundleRecord, own: Bundle, blobs: Blobs, state: Path) -> Bundle:
    """The bundle: the server's own, or one that the registry built."""
    if wanted.build_id == own.manifest.build_id:
        return own
    if not wanted.files:
        raise BundleError(
            f"the registry serves the bundle {wanted.name!r} (build {wanted.build_id}), and {own.path} is build "
            f"{own.manifest.build_id}: serve the folder of that build, or begin a registry for this one with "
            "another TWINSERVE_STATE_DIR (and TWINSERVE_CATALOGUE), or switch a running server to this one with "
            "POST /admin/bundles"
        )
    return materialise(wanted, blobs, state / _BUNDLES)


def _blob_options(settings: Settings) -> Mapping[str, Any]:
    if settings.blob_options is None:
        return {}
    try:
        options = json.loads(settings.blob_options.get_secret_value())
    except ValueError as error:
        raise ValueError("TWINSERVE_BLOB_OPTIONS is not JSON") from error
    if not isinstance(options, dict):
        raise ValueError("TWINSERVE_BLOB_OPTIONS is no JSON object")
    return options
