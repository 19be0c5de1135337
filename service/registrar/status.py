"""What operators see of experts and replicas: the catalogue's records beside what runs here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experts.registry.records import Expert, ExpertState, Replica, Trial
from service.core import ExpertStatus


@dataclass(frozen=True, slots=True)
class ExpertView:
    """One expert: what the catalogue says of it, and what this replica has of it.

    Attributes:
        generation: the one that serves, or would if the expert were enabled; 0 before the first is ready.
        routed: the router can choose it; otherwise it serves by name or gates only.
        leases: live requests that use it here, older generations of it included.
        nbytes: bytes of its factors in memory here; an estimate for one that never was.
        resident: its factors are on the device.
        loaded: this replica serves that generation. False while it is being loaded, or if it cannot be.
        generations: number → live requests, of every generation of it that is in memory here.
    """

    name: str
    generation: int
    state: ExpertState
    routed: bool = False
    leases: int = 0
    nbytes: int = 0
    max_rank: int = 0
    resident: bool = False
    loaded: bool = False
    pinned: bool = False
    trial: Trial | None = None
    generations: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RegistryState:
    """The registry as this replica sees it.

    Attributes:
        revision: the catalogue's, as last seen.
        served_revision: of the snapshot that this replica serves.
        build_id: of the bundle that it serves.
        replica: this replica's id.
        replicas: all that report themselves, this one too.
        broken: "name@generation" → why this replica cannot serve it; it is tried again.
        writable: changes are accepted; else `problem` says why not.
        problem: what keeps the catalogue from being asked, or jobs from running here; empty while all is well.
    """

    revision: int
    served_revision: int
    build_id: str
    replica: str
    replicas: Sequence[Replica]
    broken: Mapping[str, str]
    writable: bool
    problem: str = ""


def merge(expert: Expert, running: Sequence[ExpertStatus]) -> ExpertView:
    """One expert of the catalogue, with what runs here of it.

    Args:
        expert: the record.
        running: statuses of its generations in memory.
    """
    own = {status.generation: status for status in running if status.name == expert.name}
    number = expert.generation or 0
    live = own.get(number)
    serves = live is not None and live.state == "active"
    return ExpertView(
        name=expert.name,
        generation=number,
        state=expert.state,
        routed=serves and live is not None and live.routed,
        leases=sum(status.leases for status in own.values()),
        nbytes=live.nbytes if live else 0,
        max_rank=live.max_rank if live else 0,
        resident=live is not None and live.resident,
        loaded=serves,
        pinned=expert.pinned,
        trial=expert.trial,
        generations={generation: status.leases for generation, status in sorted(own.items())},
    )
