"""Prototypes under one shared covariance: linear discriminant analysis (Fisher 1936; the score of arXiv 1807.03888).

A new expert joins by its own prompts' mean and spread, in a fraction of a second, and nobody else's prompts
are needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experts.errors import RoutingError
from experts.routing.examples import check_features, checked_rows, sample, stack
from experts.routing.features import FeatureSpec
from experts.routing.guard import Guard, GuardConfig, abstained, fitted_guard
from experts.routing.router import WEIGHTS_NAME
from experts.routing.statistics import ClassStatistics
from experts.routing.storage import misfit, read_config, read_tensors, write_router
from experts.routing.training import Calibration

KEPT = 32
"""Held-out features kept of each expert, by which the temperature is set anew when one joins."""
PROTOTYPES = 2
"""Of each expert: chats and raw prompts lie apart."""
RANK = 256
"""Principal directions kept of the shared covariance."""
_FEW = 5
"""Rows below which an expert's prompts are one prototype."""


class PrototypeRecord(BaseModel):
    """How the fit did on held-out features; part of router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_features: int
    validation_features: int
    validation_accuracy: float
    nll: float
    shrinkage: float


class _Config(BaseModel):
    """router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gaussian"]
    generation: int
    owners: tuple[str, ...]
    spec: FeatureSpec
    top_k: int
    threshold: float
    temperature: float
    record: PrototypeRecord
    guard: GuardConfig | None = None


@dataclass(frozen=True, slots=True)
class GaussianRouter:
    """A fitted router; immutable.

    Attributes:
        statistics: prototypes and shared covariance.
        temperature: divides the discriminant scores, which are far too sure of themselves.
        kept: expert → held-out features, float16 (n, d).
        guard: abstains for prompts unlike all; None never does.
    """

    kind: ClassVar[str] = "gaussian"

    statistics: ClassStatistics
    spec: FeatureSpec
    generation: int
    top_k: int
    threshold: float
    temperature: float
    kept: Mapping[str, Tensor]
    record: PrototypeRecord
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
        rank: int = RANK,
        guard_rate: float | None = None,
    ) -> "GaussianRouter":
        """Fit on expert → features (n, d) float32, with a disjoint split of the same form for calibration.

        Args:
            prototypes: of each expert.
            rank: principal directions of the shared covariance that are kept.
            guard_rate: share of held-out prompts that a guard may leave out; None fits no guard.

        Raises:
            RoutingError: an expert lacks features in a split, widths differ, or a feature is not finite.
        """
        check_features(training, validation)
        statistics = ClassStatistics.fit(training, prototypes=prototypes, rank=rank)
        guard = fitted_guard(training, validation, spec, guard_rate)
        kept = {name: sample(validation[name], KEPT) for name in statistics.names}
        record = PrototypeRecord(
            train_features=sum(rows.shape[0] for rows in training.values()),
            validation_features=0,
            validation_accuracy=0,
            nll=0,
            shrinkage=0,
        )
        router = cls(statistics, spec, 0, top_k, threshold, 1.0, kept, record, guard)
        return router._calibrated(validation)

    @property
    def names(self) -> tuple[str, ...]:
        """See `Router.names`."""
        return self.statistics.names

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """See `Router.probabilities`."""
        return torch.softmax(self._logits(features) / self.temperature, dim=1)

    @torch.inference_mode()
    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`."""
        return abstained(self.guard, features)

    def without(self, name: str) -> "GaussianRouter | None":
        """See `Router.without`; the covariance and the temperature stay."""
        if name not in self.names:
            return self
        statistics = self.statistics.without(name)
        if statistics is None:
            return None
        kept = {other: rows for other, rows in self.kept.items() if other != name}
        guard = self.guard.without(name) if self.guard else None
        return replace(self, statistics=statistics, kept=kept, guard=guard)

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int = 0) -> "GaussianRouter":
        """See `Router.refitted`: the expert's prototypes are added, nothing is trained and nothing is random."""
        check_features({name: training}, {name: validation})
        if training.shape[1] != self.statistics.width:
            raise RoutingError(
                f"features of {name!r} are {training.shape[1]} wide; this router reads {self.statistics.width}"
            )
        prototypes = PROTOTYPES if training.shape[0] >= _FEW * PROTOTYPES else 1
        rank = max(self.statistics.basis.shape[1], 1)
        statistics = self.statistics.joined(name, training, prototypes=prototypes, rank=rank)
        kept = {**self.kept, name: sample(validation, KEPT)}
        guard = self.guard.joined(name, training, validation) if self.guard else None
        record = self.record.model_copy(
            update={"train_features": self.record.train_features + training.shape[0]}
        )
        router = replace(
            self,
            statistics=statistics,
            kept={each: kept[each] for each in sorted(kept)},
            guard=guard,
            record=record,
        )
        return router._calibrated(router.kept)

    def describe(self) -> dict[str, Any]:
        """See `Router.describe`."""
        told: dict[str, Any] = {
            "validation_accuracy": self.record.validation_accuracy,
            "temperature": self.temperature,
            "fit": self.record.model_dump(mode="json"),
        }
        return told | ({"guard_rate": self.guard.rate} if self.guard else {})

    def at_generation(self, generation: int) -> "GaussianRouter":
        """See `Router.at_generation`."""
        return replace(self, generation=generation)

    def save(self, folder: Path) -> None:
        """See `Router.save`."""
        write_router(folder, *self.packed())

    def packed(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """See `Packable.packed`."""
        config = _Config(
            kind="gaussian",
            generation=self.generation,
            owners=self.statistics.owners,
            spec=self.spec,
            top_k=self.top_k,
            threshold=self.threshold,
            temperature=self.temperature,
            record=self.record,
            guard=self.guard.config if self.guard else None,
        )
        tensors = self.statistics.tensors() | {f"kept.{name}": rows for name, rows in self.kept.items()}
        return config, tensors | (self.guard.tensors() if self.guard else {})

    @classmethod
    def load(cls, folder: Path) -> "GaussianRouter":
        """Read what `save` wrote.

        Raises:
            RoutingError: a file is missing or malformed, or its tensors do not fit its description.
        """
        config, tensors = read_config(folder, _Config), read_tensors(folder)
        try:
            statistics = ClassStatistics.read(config.owners, tensors)
            kept = {name: tensors[f"kept.{name}"] for name in statistics.names}
            guard = Guard.read(config.guard, tensors) if config.guard else None
        except (KeyError, RoutingError) as error:
            raise misfit(folder, error) from error
        if any(rows.dim() != 2 or rows.shape[1] != statistics.width for rows in kept.values()):
            raise RoutingError(
                f"{folder / WEIGHTS_NAME}: kept features do not fit the means; restore the file"
            )
        return cls(
            statistics,
            config.spec,
            config.generation,
            config.top_k,
            config.threshold,
            config.temperature,
            kept,
            config.record,
            guard,
        )

    def _logits(self, features: Tensor) -> Tensor:
        """(n, d) → (n, experts): half the negative squared distance to the nearest prototype of each."""
        width = self.statistics.width
        distances = self.statistics.distances(checked_rows(features, width))
        return -self.statistics.by_class(distances) * (width / 2)

    def _calibrated(self, held_out: Mapping[str, Tensor]) -> "GaussianRouter":
        """With the temperature that suits held-out features by expert, and a record of how it does on them."""
        rows, labels = stack(held_out, self.names)
        logits = self._logits(rows)
        # In units of the logits' own size, so that the search range fits any width.
        unit = max(float(logits.std()), 1e-6) / 10
        found = Calibration.of(logits, labels, unit)
        record = self.record.model_copy(
            update={
                "validation_features": rows.shape[0],
                "validation_accuracy": found.accuracy,
                "nll": found.nll,
                "shrinkage": self.statistics.shrinkage,
            }
        )
        return replace(self, temperature=found.temperature, record=record)
