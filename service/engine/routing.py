"""Router features → gates → a leased pattern."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from experts.routing import SHARED_ARM, Decision, Router, Settling, judged, select_gates
from service.core import Pattern, RoutingChoice, RoutingOutcome
from service.errors import InvalidRequestError
from service.scheduler.catalogue import Catalogue


@dataclass(frozen=True, slots=True)
class RoutingDefaults:
    """What holds where the request says nothing; None takes the router's own defaults."""

    top_k: int | None = None
    threshold: float | None = None


class Adjuster(Protocol):
    """What may change a router's row before it becomes gates; `service.feedback.Feedback` fits it."""

    def decide(
        self, features: Tensor, static: Mapping[str, float], threshold: float, *, explore: bool
    ) -> Decision | None:
        """The routing of one prompt (d,) after feedback; None leaves the router's."""
        ...


class Dispatcher:
    """Owns the current router. Used by the engine thread; `fixed` also by the event loop."""

    def __init__(self, catalogue: Catalogue, router: Router | None, defaults: RoutingDefaults) -> None:
        self.catalogue = catalogue
        self.router = router
        self._defaults = defaults
        self.adjuster: Adjuster | None = None

    def fixed(self, choice: RoutingChoice) -> tuple[Pattern, RoutingOutcome]:
        """Lease the gates that the client named.

        Raises:
            UnknownExpertError: a name is not registered.
        """
        pattern = self.catalogue.lease(choice.gates or {}, choice.generations)
        return pattern, outcome(pattern)

    def settles(self, features: Tensor) -> list[bool]:
        """Of which prompts the router needs no more than their features at the first tap (n, d).

        Feedback reads all features, so with it none is settled early.
        """
        router: object = self.router
        if self.adjuster is not None or not isinstance(router, Settling):
            return [False] * len(features)
        found: list[bool] = router.settles(features)[1].tolist()
        return found

    def route(
        self, features: Tensor, choice: RoutingChoice, *, explore: bool = True
    ) -> tuple[Pattern, RoutingOutcome]:
        """Ask the router about one prompt's features (d,) and lease what it chooses: nothing where it abstains.

        Args:
            features: (d,).
            choice: what the request says of its gates.
            explore: the answer will be generated, so feedback may try another expert.

        Raises:
            InvalidRequestError: there is no router.
        """
        router = self.router
        if router is None:
            raise InvalidRequestError(
                "this bundle has no router; name an expert as model, or give gates", param="model"
            )
        found, silent = judged(router, features[None])
        row = _tempered(found[0], choice.temperature)
        known = self.catalogue.current()
        scores = dict(zip(router.names, row.tolist(), strict=True))
        usable = [name for name in router.names if name in known]
        threshold = _first(choice.threshold, self._defaults.threshold, router.threshold)
        decision = None
        if self.adjuster is not None:
            static = {name: scores[name] for name in usable}
            decision = self.adjuster.decide(features, static, threshold, explore=explore)
        scores |= decision.adjusted if decision is not None else {}
        gates = select_gates(
            [scores[name] for name in usable],
            usable,
            choice.top_k or self._defaults.top_k or router.top_k,
            threshold,
        )
        if decision is not None and decision.alone is not None:
            gates = {} if decision.alone == SHARED_ARM else {decision.alone: 1.0}
        abstained = choice.abstain and bool(silent[0])
        pattern = self.catalogue.lease({} if abstained else gates)
        told = outcome(pattern, router.generation, scores, abstained=abstained)
        # A guard decides with certainty, so that a rating of what followed tells feedback nothing of its own choice.
        if decision is not None and not abstained:
            told = replace(told, explored=decision.explored, decision=decision)
        return pattern, told


def outcome(
    pattern: Pattern,
    router_generation: int | None = None,
    scores: dict[str, float] | None = None,
    *,
    abstained: bool = False,
) -> RoutingOutcome:
    """What an answer says of its gates."""
    return RoutingOutcome(
        gates={key.name: weight for key, weight in pattern.gates},
        pattern=str(pattern),
        mode="factored" if pattern.gates else "shared",
        generations={key.name: key.generation for key, _ in pattern.gates},
        router_generation=router_generation,
        confidence=max(scores.values()) if scores else None,
        scores=scores or {},
        abstained=abstained,
    )


def _tempered(row: Tensor, temperature: float) -> Tensor:
    """(experts,) probabilities whose logits are divided by the temperature: p^(1/T), summing to 1 again."""
    if temperature == 1.0:
        return row
    # In logarithms and float64: a high power of a small probability must not become nothing.
    return torch.softmax(row.to(torch.float64).log() / temperature, dim=0)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
