"""What a router is. `kinds.py` finds the code of one that a bundle holds."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from experts.routing.features import FeatureSpec

CONFIG_NAME = "router.json"
WEIGHTS_NAME = "router.safetensors"


class Router(Protocol):
    """Features of a prompt → a probability for every expert. Immutable; safe to share between threads.

    A kind of your own is a class with these members, and a loader that `kinds.py` can find.
    """

    @property
    def kind(self) -> str:
        """The name of its kind: `save` writes it as "kind" into router.json, and `load_router` goes by it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Experts it chooses among, in column order."""

    @property
    def spec(self) -> FeatureSpec:
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

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int) -> "Router":
        """A router of this kind that knows one more expert, or knows one anew.

        The other experts' prompts are gone, so a router has to keep what a refit needs of them.

        Args:
            name: the expert.
            training, validation: (n, d) float32 features of its prompts, no prompt in both.
            seed: of whatever is random; the same one gives the same router.

        Raises:
            RoutingError: the features cannot be used: too few, another width, NaN or Inf.
        """

    def describe(self) -> Mapping[str, Any]:
        """What `twinserve inspect` should tell beyond the members above, JSON-able.

        Strings and numbers at the top level are shown in its table too, so they should be few.
        """

    def at_generation(self, generation: int) -> "Router":
        """The same router under a new generation number."""

    def save(self, folder: Path) -> None:
        """Write router.safetensors and router.json, both, into an existing empty folder."""


@runtime_checkable
class Settling(Protocol):
    """A router that is sometimes certain after the first of its spec's taps: nothing above it is read then."""

    def settles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d of one layer) float32 of the first tap → probabilities (n, experts) and (n,) bool: these hold.

        Where they hold, `probabilities` gives the same, and features of the layers above may be NaN.
        """


@runtime_checkable
class Abstaining(Protocol):
    """A router that knows when a prompt is like nothing that it was fitted on."""

    def abstains(self, features: Tensor) -> Tensor:
        """(n, d) float32 → (n,) bool: True leaves the prompt to the shared expert alone."""


@runtime_checkable
class Judging(Protocol):
    """A router that finds both answers in one go, where either of them costs most of the other."""

    def judges(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) float32 → what `probabilities` and `abstains` give."""


@runtime_checkable
class DataFree(Protocol):
    """A router that an expert can join by its weights alone."""

    @property
    def free(self) -> tuple[str, ...]:
        """The experts that joined so."""

    def joined_data_free(self, name: str, responses: Tensor) -> Router:
        """With one more expert of which no prompt is known.

        Args:
            name: the expert.
            responses: (layers of the spec, groups, rank, hidden) float32, see `experts.registry.responses`.
        """


def judged(router: Router, features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) float32 → probabilities (n, experts), and (n,) bool: left to the shared expert alone."""
    if isinstance(router, Judging):
        return router.judges(features)
    silent = torch.zeros(features.shape[0], dtype=torch.bool)
    return router.probabilities(features), router.abstains(features) if isinstance(
        router, Abstaining
    ) else silent


def among(router: Router | None, names: Collection[str]) -> Router | None:
    """The router choosing among these experts only; None when that leaves it none."""
    for name in router.names if router is not None else ():
        if router is not None and name not in names:
            router = router.without(name)
    return router
