"""What a router is, and how one is read back from a bundle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from experts.errors import RoutingError

if TYPE_CHECKING:
    from experts.routing.features import FeatureSpec

CONFIG_NAME = "router.json"
WEIGHTS_NAME = "router.safetensors"


class Router(Protocol):
    """Features of a prompt → a probability for every expert. Immutable; safe to share between threads."""

    @property
    def names(self) -> tuple[str, ...]:
        """Experts it chooses among, in column order."""

    @property
    def spec(self) -> "FeatureSpec":
        """The features it was fitted on."""

    @property
    def generation(self) -> int:
        """Version inside its bundle, from 1; 0 before it is published."""

    @property
    def top_k(self) -> int:
        """Default number of gates to keep."""

    @property
    def threshold(self) -> float:
        """Default probability below which a gate is dropped."""

    def probabilities(self, features: Tensor) -> Tensor:
        """(n, d) float32 → (n, experts) float32 on the CPU, calibrated; every row sums to 1.

        Raises:
            RoutingError: the width d is not the one it was fitted on.
        """

    def without(self, name: str) -> "Router | None":
        """The same router choosing among the other experts; None when no other is left."""

    def at_generation(self, generation: int) -> "Router":
        """The same router under a new generation number."""

    def save(self, folder: Path) -> None:
        """Write router.safetensors and router.json into an existing empty folder."""


def load_router(folder: Path) -> Router:
    """Read a router of any kind that `save` wrote.

    Raises:
        RoutingError: a file is missing or malformed, or the kind is unknown to this version.
    """
    from experts.routing.mlp import MlpRouter

    path = folder / CONFIG_NAME
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError) as error:
        raise RoutingError(
            f"{path}: not a readable router description ({error}); restore the file"
        ) from error
    if kind != MlpRouter.kind:
        raise RoutingError(f"{path}: router kind {kind!r} is unknown; this version reads {MlpRouter.kind!r}")
    return MlpRouter.load(folder)
