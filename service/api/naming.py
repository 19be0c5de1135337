"""What a body's names mean: `model`, `gates` and `routing` together say where the gates come from.

A name is the bundle's, `shared`, an expert's, an alias of one, or either with `@generation`. One that the registry
has and this replica has not yet is waited for; nothing is ever answered with another expert instead.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from service.api.backend import Backend
from service.api.wire.request import RoutingOptions
from service.core import RoutingChoice
from service.errors import (
    InvalidRequestError,
    LimitExceededError,
    ModelNotFoundError,
    TwinserveError,
    UnknownExpertError,
)

SHARED = "shared"
"""The model name of the shared expert alone."""

_AWAITED = 16
"""Names of one request that may be waited for: no honest one names more that are new."""


class Names(Protocol):
    """What names mean besides the experts that run here; `service.registrar.Registrar` fits."""

    def resolve(self, model: str) -> str:
        """The expert that an alias stands for; any other name as it is."""
        ...

    def served_aliases(self) -> Mapping[str, str]:
        """Alias → expert, of what this replica serves."""
        ...

    async def ready_for(self, names: Collection[str]) -> None:
        """Wait, within bounds, for experts and `name@generation` that are registered and not here yet.

        Raises:
            ExpertNotLoadedError, ExpertUnavailableError, RegistryUnavailableError: one is not here in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class Named:
    """An expert as a client named it.

    Attributes:
        generation: the only one that will do; None is whichever is live.
    """

    name: str
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class Naming:
    """Finds what names mean.

    Attributes:
        max_gate: the largest absolute weight.
    """

    backend: Backend
    names: Names
    max_gate: float

    async def choose(
        self, model: str, gates: Mapping[str, float] | None = None, options: RoutingOptions | None = None
    ) -> RoutingChoice:
        """What `model`, `gates` and `routing` of a body mean together.

        Raises:
            ModelNotFoundError: `model` names nothing that is served.
            UnknownExpertError: a gate names no expert.
            ExpertNotLoadedError, ExpertUnavailableError, RegistryUnavailableError: an expert that is registered
                is not here, or the registry cannot be asked about one that isn't.
            LimitExceededError: more gates than experts, or a weight beyond `max_gate`.
            InvalidRequestError: the three contradict each other, or two gates name one expert.
        """
        routed = model == self.backend.bundle_name
        named = None if routed or model == SHARED else await self._model(model)
        if gates is not None and not routed:
            raise InvalidRequestError(
                f"'gates' mixes experts itself: send it with model {self.backend.bundle_name!r}, not {model!r}.",
                param="gates",
            )
        if options is not None and (gates is not None or not routed):
            raise InvalidRequestError(
                f"'routing' sets up the router: send it with model {self.backend.bundle_name!r} and without "
                "'gates'.",
                param="routing",
            )
        if gates is not None:
            return await self._mix(gates)
        if named is not None:
            return RoutingChoice({named.name: 1.0}, generations=_pinned([named]))
        if not routed:
            return RoutingChoice(gates={})
        if options is None:
            return RoutingChoice()
        _check_router(options, self.backend)
        return RoutingChoice(
            top_k=options.top_k,
            threshold=options.threshold,
            abstain=options.abstain,
            temperature=options.temperature,
        )

    async def experts(self, given: Mapping[str, str]) -> Mapping[str, Named]:
        """Experts by what a client called them.

        Args:
            given: name, alias or either with `@generation` → the field that holds it.

        Raises:
            UnknownExpertError: there is none, or not that generation; under its field.
            ExpertNotLoadedError, ExpertUnavailableError, RegistryUnavailableError: as `choose`.
        """
        served = self.backend.expert_names()
        missing = [name for name in given if self.find(name, served) is None][:_AWAITED]
        if missing:
            await self._ready(missing, given[missing[0]])
            served = self.backend.expert_names()
        found: dict[str, Named] = {}
        for name, param in given.items():
            named = self.find(name, served)
            if named is None:
                raise UnknownExpertError(self._unknown(name), param=param)
            found[name] = named
        return found

    def find(self, given: str, served: Collection[str] | None = None) -> Named | None:
        """The expert that is served here under a name; None if none is.

        Args:
            served: `backend.expert_names()`, where many names are looked up.
        """
        if served is None:
            served = self.backend.expert_names()
        name = self.names.resolve(given)
        if name in served:
            return Named(name)
        name, number = self._split(given)
        if number is None:
            return None
        here = (it for it in self.backend.experts() if it.state != "retired")
        return next((Named(name, number) for it in here if (it.name, it.generation) == (name, number)), None)

    async def _model(self, model: str) -> Named:
        named = self.find(model)
        if named is None:
            await self._ready([model], "model")
            named = self.find(model)
        if named is None:
            name, number = self._split(model)
            told = "" if number is None else self._other_generation(name, number)
            raise ModelNotFoundError(told, param="model") if told else _no_model(model)
        return named

    async def _ready(self, names: Collection[str], param: str) -> None:
        try:
            await self.names.ready_for([self._real(name) for name in names])
        except TwinserveError as error:
            error.param = param
            raise

    async def _mix(self, gates: Mapping[str, float]) -> RoutingChoice:
        """Gates by what the client called its experts → by their names."""
        count = len(self.backend.expert_names())
        if len(gates) > count + _AWAITED:
            raise _too_many(gates, count)
        named = await self.experts({name: f"gates.{name[:64]}" for name in gates})
        if len({one.name for one in named.values()}) < len(gates):
            raise _named_twice(named)
        count = len({it.name for it in self.backend.experts() if it.state != "retired"})
        if len(gates) > count:
            raise _too_many(gates, count)
        for name, weight in gates.items():
            check_weight(f"gates.{name[:64]}", weight, self.max_gate)
        weights = {named[name].name: weight for name, weight in gates.items()}
        return RoutingChoice(weights, generations=_pinned(named.values()))

    def _split(self, given: str) -> tuple[str, int | None]:
        """`name@generation`, the alias resolved; no number where it is none."""
        name, _, number = given.rpartition("@")
        if not (name and number.isascii() and number.isdigit() and len(number) < 10):
            return given, None
        return self.names.resolve(name), int(number)

    def _real(self, given: str) -> str:
        name, number = self._split(given)
        return self.names.resolve(given) if number is None else f"{name}@{number}"

    def _unknown(self, given: str) -> str:
        name, number = self._split(given)
        told = "" if number is None else self._other_generation(name, number)
        return told or f"The expert {given[:64]!r} is not registered."

    def _other_generation(self, name: str, number: int) -> str:
        live = next(
            (it.generation for it in self.backend.experts() if it.name == name and it.state == "active"), None
        )
        if live is None:
            return ""
        return (
            f"Generation {number} of the expert {name!r} is not live; {live} is: send {name!r}, which is always "
            "the live one."
        )


def _pinned(experts: Collection[Named]) -> dict[str, int]:
    return {one.name: one.generation for one in experts if one.generation is not None}


def _check_router(options: RoutingOptions, backend: Backend) -> None:
    names = backend.router_names()
    if options.router is not None and options.router not in names:
        raise InvalidRequestError(
            f"routing.router: this bundle has no router {options.router[:64]!r}; it has: "
            f"{', '.join(names) or 'none'}.",
            param="routing.router",
        )


@contextlib.contextmanager
def named_by(model: str, gates: Mapping[str, float] | None) -> Iterator[None]:
    """Where experts are leased: one that was retired since `choose` is missed under its own field.

    Raises:
        ModelNotFoundError: `model` named it.
        UnknownExpertError: a gate named it.
    """
    try:
        yield
    except UnknownExpertError as error:
        if gates is not None:
            raise
        raise _no_model(model) from error


def _no_model(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The model {model[:256]!r} does not exist; GET /v1/models lists the names.", param="model"
    )


def _too_many(gates: Mapping[str, float], count: int) -> LimitExceededError:
    return LimitExceededError(f"'gates' names {len(gates)} experts; {count} are registered.", param="gates")


def _named_twice(named: Mapping[str, Named]) -> InvalidRequestError:
    seen: dict[str, str] = {}
    for given, one in named.items():
        if one.name in seen:
            param = f"gates.{given[:64]}"
            return InvalidRequestError(
                f"{param}: is the expert {one.name!r}, which {seen[one.name][:64]!r} names too; send one weight.",
                param=param,
            )
        seen[one.name] = given
    raise AssertionError("every gate names another expert")


def check_weight(param: str, weight: float, max_gate: float) -> None:
    """Raise LimitExceededError for a gate beyond the operator's bound."""
    if abs(weight) > max_gate:
        raise LimitExceededError(
            f"{param} is {weight:g}; weights are limited to ±{max_gate:g} (max_gate).", param=param
        )
