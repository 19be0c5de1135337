"""Router features → gates → a leased pattern."""

from dataclasses import dataclass

from torch import Tensor

from experts.routing import Router, select_gates
from service.core import Pattern, RoutingChoice, RoutingOutcome
from service.errors import InvalidRequestError
from service.scheduler.catalogue import Catalogue


@dataclass(frozen=True, slots=True)
class RoutingDefaults:
    """What holds where the request says nothing; None takes the router's own defaults."""

    top_k: int | None = None
    threshold: float | None = None


class Dispatcher:
    """Owns the current router. Used by the engine thread; `fixed` also by the event loop."""

    def __init__(self, catalogue: Catalogue, router: Router | None, defaults: RoutingDefaults) -> None:
        self.catalogue = catalogue
        self.router = router
        self._defaults = defaults

    def fixed(self, choice: RoutingChoice) -> tuple[Pattern, RoutingOutcome]:
        """Lease the gates that the client named.

        Raises:
            UnknownExpertError: a name is not registered.
        """
        pattern = self.catalogue.lease(choice.gates or {})
        return pattern, outcome(pattern)

    def route(self, features: Tensor, choice: RoutingChoice) -> tuple[Pattern, RoutingOutcome]:
        """Ask the router about one prompt's features (d,) and lease what it chooses.

        Raises:
            InvalidRequestError: there is no router.
        """
        router = self.router
        if router is None:
            raise InvalidRequestError(
                "this bundle has no router; name an expert as model, or give gates", param="model"
            )
        row = router.probabilities(features[None])[0]
        known = self.catalogue.current()
        scores = dict(zip(router.names, row.tolist(), strict=True))
        usable = [name for name in router.names if name in known]
        gates = select_gates(
            [scores[name] for name in usable],
            usable,
            choice.top_k or self._defaults.top_k or router.top_k,
            _first(choice.threshold, self._defaults.threshold, router.threshold),
        )
        pattern = self.catalogue.lease(gates)
        return pattern, outcome(pattern, router.generation, scores)


def outcome(
    pattern: Pattern, router_generation: int | None = None, scores: dict[str, float] | None = None
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
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
