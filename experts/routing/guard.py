"""Abstention: is a prompt like anything that the experts are for, or should the shared expert answer alone?

Squared Mahalanobis distance to the nearest prototype in the shared covariance (Lee et al., arXiv 1807.03888).
Every pooled state is brought to one length first. Distances are compared with those that the prototype's own
held-out prompts have, as logarithms: so far above their median, in units from it to their 95th percentile. Chats
and raw prompts, whose distances differ much, so share one threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experts.errors import RoutingError
from experts.routing.features import FeatureSpec
from experts.routing.statistics import ClassStatistics

PROTOTYPES = 2
"""Of each expert: chats and raw prompts lie apart."""
RANK = 128
"""Principal directions of its covariance."""
RATE = 0.01
"""Share of held-out prompts that it may leave out, unless told otherwise."""
_TRUSTED = 20
"""Held-out rows from which on a prototype's own spread is believed alone."""
_LEAST_SPREAD = 0.05
_UNSURE = 2.0
"""How much wider a spread is taken that few rows tell of."""


class GuardConfig(BaseModel):
    """What router.json says of a guard; its tensors stand under ``guard.``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owners: tuple[str, ...]
    states: int
    rate: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Guard:
    """Knows what the experts' prompts look like; immutable.

    Attributes:
        statistics: prototypes and shared covariance of the training prompts.
        centres, spreads: (prototypes,) float32, median and upper spread of its held-out prompts' log distances.
        states: pooled states that a feature vector is made of, `FeatureSpec.size(1)`.
        threshold: a score above it is out of distribution.
        rate: share of held-out prompts that the threshold was chosen to leave out.
    """

    statistics: ClassStatistics
    centres: Tensor
    spreads: Tensor
    states: int
    threshold: float
    rate: float

    @classmethod
    def fit(
        cls,
        training: Mapping[str, Tensor],
        validation: Mapping[str, Tensor],
        *,
        states: int,
        rate: float = RATE,
        prototypes: int = PROTOTYPES,
    ) -> "Guard":
        """From expert → features (n, d) of two disjoint splits, each of so many pooled states side by side.

        Raises:
            RoutingError: the rate is not in [0, 0.5], or the width does not divide.
        """
        if not 0 <= rate <= 0.5:
            raise RoutingError(
                f"guard rate {rate} is outside [0, 0.5]; 0.01 leaves out one prompt in a hundred"
            )
        levelled = {name: level(rows, states) for name, rows in training.items()}
        statistics = ClassStatistics.fit(levelled, prototypes=prototypes, rank=RANK)
        blank = torch.zeros(len(statistics.owners))
        guard = cls(statistics, blank, blank + 1, states, 0.0, rate)
        for name in statistics.names:
            guard = guard._centred(name, validation[name])
        scores = torch.cat([guard.scores(validation[name]) for name in statistics.names])
        return replace(guard, threshold=float(torch.quantile(scores, 1 - rate)))

    def scores(self, features: Tensor) -> Tensor:
        """(n, d) → (n,): how unlike every expert's prompts, in spreads of the nearest prototype."""
        if features.dim() != 2 or features.shape[1] != self.statistics.width:
            raise RoutingError(
                f"features have shape {tuple(features.shape)}; this guard reads (n, {self.statistics.width})"
            )
        logs = self._logs(features)
        nearest = logs.argmin(1, keepdim=True)
        scores = (logs - self.centres) / self.spreads
        return scores.gather(1, nearest)[:, 0]

    @torch.inference_mode()
    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`."""
        return self.scores(features) > self.threshold

    def joined(self, name: str, training: Tensor, validation: Tensor) -> "Guard":
        """With one more expert, or one known anew. Covariance and threshold stay, so the others' odds do."""
        statistics = self.statistics.joined(
            name, level(training, self.states), prototypes=PROTOTYPES, pooled=False
        )
        before = {owner: i for i, owner in enumerate(self.statistics.owners)}
        first = {owner: statistics.owners.index(owner) for owner in before}
        centres, spreads = torch.zeros(len(statistics.owners)), torch.ones(len(statistics.owners))
        for i, owner in enumerate(self.statistics.owners):
            if owner != name:
                place = first[owner] + i - self.statistics.owners.index(owner)
                centres[place], spreads[place] = self.centres[i], self.spreads[i]
        return replace(self, statistics=statistics, centres=centres, spreads=spreads)._centred(
            name, validation
        )

    def without(self, name: str) -> "Guard | None":
        """Among the other experts; None when none is left."""
        statistics = self.statistics.without(name)
        if statistics is None:
            return None
        kept = [i for i, owner in enumerate(self.statistics.owners) if owner != name]
        return replace(self, statistics=statistics, centres=self.centres[kept], spreads=self.spreads[kept])

    @property
    def config(self) -> GuardConfig:
        """Its part of router.json."""
        return GuardConfig(
            owners=self.statistics.owners, states=self.states, rate=self.rate, threshold=self.threshold
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its part of router.safetensors."""
        own = {"guard.centres": self.centres.contiguous(), "guard.spreads": self.spreads.contiguous()}
        return {**self.statistics.tensors("guard."), **own}

    @classmethod
    def read(cls, config: GuardConfig, tensors: Mapping[str, Tensor]) -> "Guard":
        """From what `config` and `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
            RoutingError: shapes do not fit.
        """
        statistics = ClassStatistics.read(config.owners, tensors, "guard.")
        centres, spreads = tensors["guard.centres"], tensors["guard.spreads"]
        if centres.shape != (len(config.owners),) or spreads.shape != centres.shape:
            raise RoutingError("tensors guard.centres and guard.spreads do not fit the prototypes")
        return cls(statistics, centres, spreads, config.states, config.threshold, config.rate)

    def _centred(self, name: str, validation: Tensor) -> "Guard":
        """With centres and spreads of one expert's prototypes from its held-out rows (n, d)."""
        places = [i for i, owner in enumerate(self.statistics.owners) if owner == name]
        others = [i for i, owner in enumerate(self.statistics.owners) if owner != name]
        logs = self._logs(validation)[:, places]
        nearest = logs.argmin(1)
        centres, spreads = self.centres.clone(), self.spreads.clone()
        usual = float(self.spreads[others].median()) if others else 1.0
        for column, place in enumerate(places):
            rows = logs[nearest == column, column]
            if not rows.shape[0]:
                rows = logs.min(1).values
            trust = min(1.0, rows.shape[0] / _TRUSTED)
            centres[place] = torch.quantile(rows, 0.5)
            own = float(torch.quantile(rows, 0.95) - centres[place])
            # Few rows seldom hold the far ones.
            unsure = 1 + _UNSURE / rows.shape[0] ** 0.5
            spreads[place] = max(unsure * (trust * own + (1 - trust) * usual), _LEAST_SPREAD)
        return replace(self, centres=centres, spreads=spreads)

    def _logs(self, features: Tensor) -> Tensor:
        """(n, d) → (n, prototypes): log distances."""
        return self.statistics.distances(level(features, self.states)).clamp(min=1e-9).log()


@runtime_checkable
class Guarded(Protocol):
    """A router that abstains by a guard."""

    @property
    def guard(self) -> Guard | None:
        """None never abstains."""


def fitted_guard(
    training: Mapping[str, Tensor], validation: Mapping[str, Tensor], spec: FeatureSpec, rate: float | None
) -> Guard | None:
    """A guard of features by `spec` at a rate; None for none. Raises as `Guard.fit`."""
    return None if rate is None else Guard.fit(training, validation, states=spec.size(1), rate=rate)


def abstained(guard: Guard | None, features: Tensor) -> Tensor:
    """(n, d) → (n,) bool; without a guard nothing is left to the shared expert."""
    return torch.zeros(features.shape[0], dtype=torch.bool) if guard is None else guard.abstains(features)


def level(features: Tensor, states: int) -> Tensor:
    """(n, d) with each of the pooled states in it brought to length √(its width); float32 on the CPU.

    Raises:
        RoutingError: d is no multiple of `states`.
    """
    if features.dim() != 2 or features.shape[1] % states:
        raise RoutingError(f"features of shape {tuple(features.shape)} are not made of {states} states")
    rows, width = features.shape
    parts = features.to(device="cpu", dtype=torch.float32).reshape(rows, states, width // states)
    sizes = parts.square().mean(2, keepdim=True).clamp(min=1e-12).sqrt()
    return (parts / sizes).flatten(1)
