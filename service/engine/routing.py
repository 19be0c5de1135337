"""Router features → gates → a leased pattern; which router is asked, and who looks on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from experts.routing import SHARED_ARM, Decision, Router, Settling, distance, fitted, judged, select_gates
from service.core import (
    Pattern,
    RouterBaseline,
    RouteStats,
    RoutingChoice,
    RoutingOutcome,
    ShadowStats,
)
from service.engine.trials import Trial, Trials, compared
from service.errors import InvalidRequestError
from service.scheduler.catalogue import Catalogue

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class _Judgement:
    """A router's word on one prompt.

    Attributes:
        scores: every expert's probability.
        gates: what it chooses, before abstention.
        silent: it would leave the prompt to the shared expert.
    """

    scores: dict[str, float]
    gates: dict[str, float]
    silent: bool


class Dispatcher:
    """Owns the current router and the trials. Used by the engine thread; `fixed` also by the event loop."""

    def __init__(self, catalogue: Catalogue, router: Router | None, defaults: RoutingDefaults) -> None:
        self.catalogue = catalogue
        self.adjuster: Adjuster | None = None
        self._defaults = defaults
        self._routes: list[RouteStats] = []
        self.direct(router)

    def direct(self, router: Router | None, trials: Trials | None = None) -> None:
        """Ask this router from now on, with these trials beside it; together with the catalogue's own switch."""
        self.router = router
        self.trials = trials or Trials()
        self.baseline = None if router is None else _baseline(router)
        self._mute = False

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
        self,
        features: Tensor,
        choice: RoutingChoice,
        *,
        explore: bool = True,
        request_id: str | None = None,
    ) -> tuple[Pattern, RoutingOutcome]:
        """Ask the router about one prompt's features (d,) and lease what it chooses: nothing where it abstains.

        Args:
            features: (d,).
            choice: what the request says of its gates.
            explore: the answer will be generated, so feedback may try another expert.
            request_id: of a real request, which may belong to a trial and is counted; None asks the current router.

        Raises:
            InvalidRequestError: there is no router.
        """
        trial = self.trials.of(request_id) if request_id is not None else None
        canary = trial if trial is not None and trial.kind == "canary" else None
        router = self._router_of(canary)
        if router is None:
            raise InvalidRequestError(
                "this bundle has no router; name an expert as model, or give gates", param="model"
            )
        found, decision = self._judge(router, features, choice, canary, explore=explore)
        abstained = choice.abstain and found.silent
        gates = {} if abstained else found.gates
        pattern = self.catalogue.lease(gates, instead=canary.key if canary is not None else None)
        told = outcome(pattern, router.generation, found.scores, abstained=abstained)
        # A guard decides with certainty, so that a rating of what followed tells feedback nothing of its own choice.
        if decision is not None and not abstained:
            told = replace(told, explored=decision.explored, decision=decision)
        if canary is not None:
            told = replace(told, trial=canary.key)
        if request_id is not None:
            shadow = trial if trial is not None and trial.kind == "shadow" else None
            self._count(router, features, choice, found, told, shadow)
        return pattern, told

    def taken(self) -> tuple[RouteStats, ...]:
        """What was counted since the last call."""
        routes, self._routes = tuple(self._routes), []
        return routes

    def _judge(
        self,
        router: Router,
        features: Tensor,
        choice: RoutingChoice,
        trial: Trial | None = None,
        *,
        explore: bool = False,
    ) -> tuple[_Judgement, Decision | None]:
        """What a router says; feedback knows the current generations alone, so it has no part in trials."""
        found, silent = judged(router, features[None])
        row = _tempered(found[0], choice.temperature)
        known = self.catalogue.current()
        scores = dict(zip(router.names, row.tolist(), strict=True))
        tried = trial.key.name if trial is not None else None
        usable = [name for name in router.names if name in known or name == tried]
        threshold = _first(choice.threshold, self._defaults.threshold, router.threshold)
        decision = None
        if self.adjuster is not None and trial is None:
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
        return _Judgement(scores, gates, bool(silent[0])), decision

    def _count(
        self,
        router: Router,
        features: Tensor,
        choice: RoutingChoice,
        found: _Judgement,
        told: RoutingOutcome,
        shadow: Trial | None,
    ) -> None:
        """Keep what tells of drift and of trials; nothing here may fail the request."""
        seen, far = None, None
        try:
            if shadow is not None:
                seen = self._shadow(features, choice, told, shadow)
            far = distance(router, features)
        except Exception:  # noqa: BLE001 what is only counted must not cost an answer
            if not self._mute:
                self._mute = True
                _log.exception("what a request tells of the router cannot be found out")
        self._routes.append(
            RouteStats(
                confidence=max(found.scores.values(), default=0.0),
                abstained=told.abstained,
                distance=far,
                trial=told.trial,
                shadow=seen,
            )
        )

    def _shadow(
        self, features: Tensor, choice: RoutingChoice, told: RoutingOutcome, trial: Trial
    ) -> ShadowStats | None:
        # Without a router of its own it would be compared with itself, and always agree.
        if trial.router is None:
            return None
        router = trial.router
        judgement, _ = self._judge(router, features, choice, trial)
        gates = {} if choice.abstain and judgement.silent else judgement.gates
        difference = compared(told.gates, gates)
        return ShadowStats(trial.key, difference.agree, difference.difference)

    def _router_of(self, trial: Trial | None) -> Router | None:
        return trial.router if trial is not None and trial.router is not None else self.router


def _baseline(router: Router) -> RouterBaseline:
    expected = fitted(router)
    return RouterBaseline(
        generation=router.generation,
        experts=len(router.names),
        abstention=expected.abstention,
        threshold=expected.threshold,
        accuracy=expected.accuracy,
    )


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
