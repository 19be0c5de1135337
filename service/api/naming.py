"""What a body's names mean: `model`, `gates` and `routing` together say where the gates come from."""

import contextlib
from collections.abc import Iterator, Mapping

from service.api.backend import Backend
from service.api.wire.request import RoutingOptions
from service.core import RoutingChoice
from service.errors import InvalidRequestError, LimitExceededError, ModelNotFoundError, UnknownExpertError

SHARED = "shared"
"""The model name of the shared expert alone."""


def choose_routing(
    model: str,
    gates: dict[str, float] | None,
    options: RoutingOptions | None,
    backend: Backend,
    max_gate: float,
) -> RoutingChoice:
    """What `model`, `gates` and `routing` of a body mean together.

    Raises:
        ModelNotFoundError: `model` names nothing that is served.
        UnknownExpertError: a gate names no expert.
        LimitExceededError: more gates than experts, or a weight beyond `max_gate`.
        InvalidRequestError: the three contradict each other.
    """
    experts = set(backend.expert_names())
    routed = model == backend.bundle_name
    name, generation = model, None
    if not routed and model != SHARED and model not in experts:
        name, generation = pinned(model, backend)
    if gates is not None and not routed:
        raise InvalidRequestError(
            f"'gates' mixes experts itself: send it with model {backend.bundle_name!r}, not {model!r}.",
            param="gates",
        )
    if options is not None and (gates is not None or not routed):
        raise InvalidRequestError(
            f"'routing' sets up the router: send it with model {backend.bundle_name!r} and without 'gates'.",
            param="routing",
        )
    if gates is not None:
        _check_gates(gates, experts, max_gate)
        return RoutingChoice(gates=gates)
    if routed:
        if options is None:
            return RoutingChoice()
        _check_router(options, backend)
        return RoutingChoice(
            top_k=options.top_k,
            threshold=options.threshold,
            abstain=options.abstain,
            temperature=options.temperature,
        )
    return RoutingChoice(
        gates={} if model == SHARED else {name: 1.0},
        generations={} if generation is None else {name: generation},
    )


def pinned(model: str, backend: Backend) -> tuple[str, int]:
    """An expert and the generation of it that must be the live one, from `name@generation`.

    Raises:
        ModelNotFoundError: there is no such expert, or another generation is live.
    """
    name, _, number = model.rpartition("@")
    if not (name in backend.expert_names() and number.isascii() and number.isdigit() and len(number) < 10):
        raise _no_model(model)
    live = next((it.generation for it in backend.experts() if it.name == name and it.state == "active"), None)
    if live != int(number):
        raise ModelNotFoundError(
            f"Generation {int(number)} of the expert {name!r} is not live; {live} is: send {name!r}, which is "
            "always the live one.",
            param="model",
        )
    return name, int(number)


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
    """Where experts are leased: one that was retired since `choose_routing` is missed under its own field.

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
        f"The model {model!r} does not exist; GET /v1/models lists the names.", param="model"
    )


def _check_gates(gates: dict[str, float], experts: set[str], max_gate: float) -> None:
    if len(gates) > len(experts):
        raise LimitExceededError(
            f"'gates' names {len(gates)} experts; {len(experts)} are registered.", param="gates"
        )
    for name, weight in gates.items():
        param = f"gates.{name[:64]}"
        if name not in experts:
            raise UnknownExpertError(f"The expert {name[:64]!r} is not registered.", param=param)
        check_weight(param, weight, max_gate)


def check_weight(param: str, weight: float, max_gate: float) -> None:
    """Raise LimitExceededError for a gate beyond the operator's bound."""
    if abs(weight) > max_gate:
        raise LimitExceededError(
            f"{param} is {weight:g}; weights are limited to ±{max_gate:g} (max_gate).", param=param
        )
