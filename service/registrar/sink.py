"""What the registrar counts; `service.registry_metrics.RegistryMetrics` fits it."""

from collections.abc import Mapping
from typing import Protocol


class RegistrySink(Protocol):
    """Called on the event loop; must not raise."""

    def on_revision(self, served: int, known: int) -> None:
        """The revision that this replica serves, and the catalogue's."""
        ...

    def on_reachable(self, *, up: bool) -> None:
        """Whether the catalogue answered when it was last asked."""
        ...

    def on_broken(self, experts: int) -> None:
        """Generations that this replica cannot load."""
        ...

    def on_load(self, seconds: float, *, failed: bool) -> None:
        """One generation was read and put onto the device, or could not be."""
        ...

    def on_job(self, kind: str, state: str, seconds: float | None) -> None:
        """A job ended that this replica ran, after so long since it was claimed."""
        ...

    def on_replicas(self, lags: Mapping[str, int]) -> None:
        """Live replicas' ids, and the revisions that each is behind."""
        ...

    def on_collected(self, generations: int, blobs: int, nbytes: int) -> None:
        """Garbage collection removed that."""
        ...
