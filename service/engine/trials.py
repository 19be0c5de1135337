"""Which routed request belongs to which trial, and what a shadow's gates are compared by. Knows no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from experts.routing import Router
from service.core import ExpertKey

TrialKind = Literal["canary", "shadow"]

_POINTS = float(2**64)


@dataclass(frozen=True, slots=True)
class Trial:
    """A generation that is tried out; see `change.LiveTrial`."""

    key: ExpertKey
    kind: TrialKind
    percent: float
    router: Router | None = None


class Trials:
    """Shares of routed requests, beside each other on a line of 100 %: a request is in one trial at most.

    Raises:
        ValueError: a share outside (0, 100], or more than 100 in all, or two trials of one expert.
    """

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self.all = tuple(sorted(trials, key=lambda trial: trial.key))
        names = [trial.key.name for trial in self.all]
        if len(set(names)) != len(names):
            raise ValueError(f"an expert has one trial at a time; given: {', '.join(names)}")
        if any(not 0 < trial.percent <= 100 for trial in self.all):
            raise ValueError("a trial's share is above 0 and at most 100 percent")
        if sum(trial.percent for trial in self.all) > 100:
            raise ValueError("the trials' shares are more than 100 percent of the routed requests")

    def of(self, request_id: str) -> Trial | None:
        """The trial that a request belongs to: always the same while the trials are."""
        if not self.all:
            return None
        place = position(request_id)
        for trial in self.all:
            if place < trial.percent:
                return trial
            place -= trial.percent
        return None


def position(request_id: str) -> float:
    """A place in [0, 100), evenly spread over ids and the same in every process."""
    digest = blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / _POINTS * 100


@dataclass(frozen=True, slots=True)
class Compared:
    """How two choices of gates differ.

    Attributes:
        agree: the same expert weighs most in both, or both have none.
        difference: mean absolute difference of the weights of all experts that either names; 0 where none is.
    """

    agree: bool
    difference: float


def compared(used: Mapping[str, float], other: Mapping[str, float]) -> Compared:
    """The gates that were used, against those that would have been."""
    names = used.keys() | other.keys()
    total = sum(abs(used.get(name, 0.0) - other.get(name, 0.0)) for name in names)
    return Compared(_top(used) == _top(other), total / len(names) if names else 0.0)


def _top(gates: Mapping[str, float]) -> str | None:
    return max(gates, key=lambda name: (gates[name], name), default=None)
