"""Nearest prototypes: cosine to a few centroids of each expert, on standardised features (spherical k-means).

The simplest router that there is, and a yardstick for the others. A new expert joins by its own prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from experts.errors import RoutingError
from experts.routing.examples import check_features, checked_rows, sample, stack
from experts.routing.features import FeatureSpec
from experts.routing.guard import Guard, GuardConfig, abstained, fitted_guard
from experts.routing.router import WEIGHTS_NAME
from experts.routing.statistics import split
from experts.routing.storage import misfit, read_config, read_tensors, write_router
from experts.routing.training import Calibration

KEPT = 32
"""Held-out features kept of each expert, by which the temperature is set anew when one joins."""
PROTOTYPES = 8
"""Centroids of each expert, where it has four times as many prompts."""
_SHARPNESS = 50.0
"""Cosines lie in [-1, 1]; logits want more room, so that one range of temperatures fits both."""


class _Config(BaseModel):
    """router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nearest"]
    generation: int
    owners: tuple[str, ...]
    spec: FeatureSpec
    top_k: int
    threshold: float
    temperature: float
    validation_accuracy: float
    nll: float
    guard: GuardConfig | None = None


@dataclass(frozen=True, slots=True)
class NearestRouter:
    """A fitted router; immutable.

    Attributes:
        owners: (prototypes,) the expert of each, sorted.
        prototypes: (prototypes, d) float32, standardised and of length one.
        mean, std: (d,) float32, of the training features.
        kept: expert → held-out features, float16 (n, d).
        guard: abstains for prompts unlike all; None never does.
    """

    kind: ClassVar[str] = "nearest"

    owners: tuple[str, ...]
    prototypes: Tensor
    mean: Tensor
    std: Tensor
    spec: FeatureSpec
    generation: int
    top_k: int
    threshold: float
    temperature: float
    kept: Mapping[str, Tensor]
    validation_accuracy: float
    nll: float
    guard: Guard | None = None

    @classmethod
    def fit(
        cls,
        training: Mapping[str, Tensor],
        validation: Mapping[str, Tensor],
        spec: FeatureSpec,
        *,
        top_k: int = 2,
        threshold: float = 0.05,
        prototypes: int = PROTOTYPES,
        guard_rate: float | None = None,
    ) -> "NearestRouter":
        """Fit on expert → features (n, d) float32, with a disjoint split of the same form for calibration.

        Raises:
            RoutingError: an expert lacks features in a split, widths differ, or a feature is not finite.
        """
        check_features(training, validation)
        names = tuple(sorted(training))
        rows, _ = stack(training, names)
        mean, std = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-6)
        found = {name: _prototypes((training[name].float() - mean) / std, prototypes) for name in names}
        kept = {name: sample(validation[name], KEPT) for name in names}
        guard = fitted_guard(training, validation, spec, guard_rate)
        owners = tuple(name for name in names for _ in found[name])
        router = cls(
            owners,
            torch.cat([found[name] for name in names]),
            mean,
            std,
            spec,
            0,
            top_k,
            threshold,
            1.0,
            kept,
            0.0,
            0.0,
            guard,
        )
        return router._calibrated(validation)

    @property
    def names(self) -> tuple[str, ...]:
        """See `Router.names`."""
        return tuple(dict.fromkeys(self.owners))

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """See `Router.probabilities`."""
        return torch.softmax(self._logits(features) / self.temperature, dim=1)

    @torch.inference_mode()
    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`."""
        return abstained(self.guard, features)

    def without(self, name: str) -> "NearestRouter | None":
        """See `Router.without`."""
        if name not in self.owners:
            return self
        rows = [i for i, owner in enumerate(self.owners) if owner != name]
        if not rows:
            return None
        return replace(
            self,
            owners=tuple(self.owners[i] for i in rows),
            prototypes=self.prototypes[rows],
            kept={other: kept for other, kept in self.kept.items() if other != name},
            guard=self.guard.without(name) if self.guard else None,
        )

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int = 0) -> "NearestRouter":
        """See `Router.refitted`: the expert's centroids are added; nothing is random."""
        check_features({name: training}, {name: validation})
        rows = [i for i, owner in enumerate(self.owners) if owner != name]
        scaled = (checked_rows(training, self.mean.shape[0]) - self.mean) / self.std
        found = _prototypes(scaled, PROTOTYPES)
        owners = [*(self.owners[i] for i in rows), *(name for _ in found)]
        order = sorted(range(len(owners)), key=lambda i: owners[i])
        kept = {**self.kept, name: sample(validation, KEPT)}
        router = replace(
            self,
            owners=tuple(owners[i] for i in order),
            prototypes=torch.cat([self.prototypes[rows], found])[order],
            kept={each: kept[each] for each in sorted(kept)},
            guard=self.guard.joined(name, training, validation) if self.guard else None,
        )
        return router._calibrated(router.kept)

    def describe(self) -> dict[str, Any]:
        """See `Router.describe`."""
        told: dict[str, Any] = {
            "validation_accuracy": self.validation_accuracy,
            "temperature": self.temperature,
            "prototypes": len(self.owners),
            "nll": self.nll,
        }
        return told | ({"guard_rate": self.guard.rate} if self.guard else {})

    def at_generation(self, generation: int) -> "NearestRouter":
        """See `Router.at_generation`."""
        return replace(self, generation=generation)

    def save(self, folder: Path) -> None:
        """See `Router.save`."""
        write_router(folder, *self.packed())

    def packed(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """See `Packable.packed`."""
        config = _Config(
            kind="nearest",
            generation=self.generation,
            owners=self.owners,
            spec=self.spec,
            top_k=self.top_k,
            threshold=self.threshold,
            temperature=self.temperature,
            validation_accuracy=self.validation_accuracy,
            nll=self.nll,
            guard=self.guard.config if self.guard else None,
        )
        tensors = {"prototypes": self.prototypes, "mean": self.mean, "std": self.std}
        tensors |= {f"kept.{name}": rows for name, rows in self.kept.items()}
        return config, tensors | (self.guard.tensors() if self.guard else {})

    @classmethod
    def load(cls, folder: Path) -> "NearestRouter":
        """Read what `save` wrote.

        Raises:
            RoutingError: a file is missing or malformed, or its tensors do not fit its description.
        """
        config, tensors = read_config(folder, _Config), read_tensors(folder)
        try:
            prototypes, mean, std = (tensors[key] for key in ("prototypes", "mean", "std"))
            kept = {name: tensors[f"kept.{name}"] for name in dict.fromkeys(config.owners)}
            guard = Guard.read(config.guard, tensors) if config.guard else None
        except (KeyError, RoutingError) as error:
            raise misfit(folder, error) from error
        if mean.dim() != 1 or std.shape != mean.shape or prototypes.shape != (len(config.owners), len(mean)):
            raise RoutingError(f"{folder / WEIGHTS_NAME}: tensor shapes do not fit; restore the file")
        return cls(
            config.owners,
            prototypes,
            mean,
            std,
            config.spec,
            config.generation,
            config.top_k,
            config.threshold,
            config.temperature,
            kept,
            config.validation_accuracy,
            config.nll,
            guard,
        )

    def _logits(self, features: Tensor) -> Tensor:
        """(n, d) → (n, experts): cosine to the closest prototype of each, × a constant."""
        scaled = (checked_rows(features, self.mean.shape[0]) - self.mean) / self.std
        cosines = functional.normalize(scaled, dim=1) @ self.prototypes.T
        columns = [[i for i, owner in enumerate(self.owners) if owner == name] for name in self.names]
        return _SHARPNESS * torch.stack([cosines[:, own].amax(1) for own in columns], dim=1)

    def _calibrated(self, held_out: Mapping[str, Tensor]) -> "NearestRouter":
        """With the temperature that suits held-out features by expert."""
        rows, labels = stack(held_out, self.names)
        found = Calibration.of(self._logits(rows), labels)
        return replace(self, temperature=found.temperature, validation_accuracy=found.accuracy, nll=found.nll)


def _prototypes(scaled: Tensor, count: int) -> Tensor:
    """(n, d) standardised → (≤ count, d) centroids of length one."""
    groups = split(scaled, min(count, max(scaled.shape[0] // 4, 1)))
    return functional.normalize(torch.stack([group.mean(0) for group in groups]), dim=1)
