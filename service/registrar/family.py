"""What a catalogue says as a family that a runtime can be opened from."""

import threading
from collections.abc import Mapping
from pathlib import Path

from experts.bundle import Bundle, ExpertWeights
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.reading import GenerationReader
from experts.registry.records import Generation, Snapshot
from experts.routing import Router


class CatalogueFamily:
    """The experts of one bundle at one revision, and whatever later generations `learn` tells of. Thread-safe.

    Args:
        bundle: has the shared expert; its own experts are not looked at.
        snapshot: what is to be served, of that bundle.
        catalogue: asked about generations of which no snapshot told.
        blobs: the files.
    """

    def __init__(self, bundle: Bundle, snapshot: Snapshot, catalogue: Catalogue, blobs: Blobs) -> None:
        self.bundle = bundle
        self.snapshot = snapshot
        self.reader = GenerationReader(blobs, bundle.shared, bundle.manifest.build_id)
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], Generation] = {}
        self._told: dict[tuple[str, int], Generation] = {}
        self.learn(snapshot)

    @property
    def name(self) -> str:
        """By which clients ask for routed answers."""
        return self.bundle.name

    @property
    def build_id(self) -> str:
        """Of the bundle."""
        return self.bundle.manifest.build_id

    @property
    def shared_path(self) -> Path:
        """The shared expert's folder."""
        return self.bundle.shared_path

    def generations(self) -> Mapping[str, int]:
        """Every expert that serves at the snapshot's revision, and its generation."""
        return {name: generation.number for name, generation in self.snapshot.experts.items()}

    def expert(self, name: str) -> ExpertWeights:
        """The tensors of the snapshot's generation. Raises RegistryError or CorruptBundleError."""
        return self.reader.expert(self.snapshot.experts[name])

    def router(self) -> Router | None:
        """The snapshot's router. Raises RegistryError or CorruptBundleError."""
        router = self.snapshot.router
        return None if router is None else self.reader.router(router)

    def loader(self) -> "CatalogueFamily":
        """Itself."""
        return self

    def load(self, name: str, generation: int) -> ExpertWeights:
        """Any ready generation of this bundle, known or looked up.

        Raises:
            RecordNotFoundError: the catalogue has no such generation.
            RegistryError, CorruptBundleError: it cannot be had.
        """
        with self._lock:
            known = self._known.get((name, generation))
        return self.reader.expert(known or self._catalogue.generation(name, generation))

    def learn(self, snapshot: Snapshot) -> None:
        """Remember where the files of this snapshot's generations are, and of the one before, which requests may
        still use: so they load without the catalogue.
        """
        told = {(it.name, it.number): it for it in (*snapshot.experts.values(), *snapshot.trial_generations)}
        with self._lock:
            self._known = {**self._told, **told}
            self._told = told
