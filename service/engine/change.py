"""What changes between two steps: experts, the router and trials, all together or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from experts.bundle import ExpertWeights
from experts.routing import Router, among
from service.core import ExpertKey
from service.engine.trials import Trial, TrialKind, Trials
from service.gating.resident import ResidentExpert
from service.scheduler.catalogue import Reach


@dataclass(frozen=True, slots=True)
class LiveTrial:
    """A generation that is tried out beside the one that serves.

    Attributes:
        weights: None where the generation is in memory already, or where only gates are compared (shadow).
        kind: canary: that share of routed requests is answered with it, and with its router; shadow: its
            router's gates are computed for that share of routed requests, compared and thrown away.
        percent: of routed requests, in (0, 100].
        router: the one that knows it; None keeps the current one.
    """

    key: ExpertKey
    weights: ExpertWeights | None
    kind: TrialKind
    percent: float
    router: Router | None = None


@dataclass(frozen=True, slots=True)
class LiveChange:
    """What holds from one step to the next.

    Attributes:
        publish: generations that become current; by key alone those that are staged or tried out, and, where
            slots are limited, those that are to be loaded when they are wanted.
        retire: names that no new request gets.
        router: the router from now on; None where requests must name their experts.
        trials: all trials from now on: those that are not named end.
    """

    publish: tuple[ExpertWeights | ExpertKey, ...] = ()
    retire: tuple[str, ...] = ()
    router: Router | None = None
    trials: tuple[LiveTrial, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedChange:
    """A change whose experts are on the device.

    Attributes:
        residents: those that were not in memory before.
        weights: what they were made of, for those that nothing else can load.
    """

    publish: tuple[ExpertKey, ...] = ()
    retire: tuple[str, ...] = ()
    router: Router | None = None
    trials: Trials = field(default_factory=Trials)
    residents: tuple[ResidentExpert, ...] = ()
    weights: tuple[ExpertWeights, ...] = ()


class Preparing(Protocol):
    """What preparing needs of `ExpertBank`."""

    def prepare(self, weights: ExpertWeights) -> ResidentExpert:
        """Device tensors of an expert. Raises ExpertRejectedError if it does not fit."""
        ...


def key_of(expert: ExpertWeights | ExpertKey) -> ExpertKey:
    """The generation that is meant."""
    return expert if isinstance(expert, ExpertKey) else ExpertKey(expert.name, expert.generation)


def prepare(
    change: LiveChange, bank: Preparing, held: Mapping[ExpertKey, Reach], *, lazy: bool
) -> PreparedChange:
    """Put everything that a change needs onto the device; takes its time, on any thread.

    Routers choose among experts that can be had: those that are current then, and the one that is tried out.

    Args:
        held: what the catalogue keeps now, and until the change is made.
        lazy: generations that are not in memory can be loaded when they are wanted.

    Raises:
        ExpertRejectedError: an expert does not fit the model.
        ValueError: a generation is neither given nor held, or the trials' shares exceed 100 %.
    """
    names = {key.name for key, reach in held.items() if reach == "active"}.difference(change.retire)
    names.update(key_of(expert).name for expert in change.publish)
    residents: dict[ExpertKey, ResidentExpert] = {}
    for expert in change.publish:
        key = key_of(expert)
        if key in held or key in residents:
            continue
        if not isinstance(expert, ExpertKey):
            residents[key] = bank.prepare(expert)
        elif not lazy:
            raise ValueError(f"{key} cannot be published by its key: it is not in memory")
    trials, weights = [], []
    for trial in change.trials:
        if trial.key not in held and trial.key not in residents:
            if trial.weights is not None:
                residents[trial.key] = bank.prepare(trial.weights)
                weights.append(trial.weights)
            elif trial.kind == "canary" and not lazy:
                raise ValueError(f"{trial.key} cannot answer a share of requests: it is not in memory")
        router = among(trial.router, names | {trial.key.name})
        trials.append(Trial(trial.key, trial.kind, trial.percent, router))
    return PreparedChange(
        publish=tuple(key_of(expert) for expert in change.publish),
        retire=change.retire,
        router=among(change.router, names),
        trials=Trials(trials),
        residents=tuple(residents.values()),
        weights=tuple(weights),
    )
