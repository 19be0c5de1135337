"""What `/admin` answers: experts, generations, jobs, aliases, bundles, the audit log, replicas.

Times are Unix seconds.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict

from service.api.wire.answers import Answer

_JOB: dict[str, Any] = {
    "id": "job-5f1d0c9e2b7a4d6f8e1c3b5a",
    "object": "job",
    "kind": "register",
    "state": "running",
    "name": "sql",
    "generation": 2,
    "percent": 42.5,
    "stage": "compress",
    "tensor": "model.layers.11.mlp.up_proj.weight",
    "eta_seconds": 1.5,
    "attempt": 1,
    "cancelling": False,
    "created_at": 1767225600.0,
    "started_at": 1767225600.1,
    "ended_at": None,
    "error": None,
    "result": None,
}


class TrialAnswer(Answer):
    """A generation that is tried out."""

    generation: int
    kind: Literal["canary", "shadow"]
    percent: float
    router_generation: int | None


class ExpertAnswer(Answer):
    """One expert as operators see it.

    Attributes:
        generation: the one that serves, or would if it were enabled; null before the first is ready.
        loaded: this replica serves that generation.
        routed: the router can choose it; else it serves by name and gates only.
        leases: live requests that use it on this replica, older generations included.
        bytes: of its factors in memory.
        resident: they are on the device.
        pinned: registrations leave its generation in place.
        in_memory: generation → live requests, of all that this replica holds.
    """

    name: str
    generation: int | None
    state: Literal["active", "disabled", "retired"]
    loaded: bool
    routed: bool
    leases: int
    bytes: int
    max_rank: int
    resident: bool
    pinned: bool
    trial: TrialAnswer | None
    in_memory: Mapping[str, int]


class ExpertList(Answer):
    """Some experts, by name."""

    object: Literal["list"] = "list"
    data: list[ExpertAnswer]
    has_more: bool


class GenerationAnswer(Answer):
    """One immutable version of one expert.

    Attributes:
        state: registering, ready, failed (its job says why), or collected: its files are gone.
        serving: it is the current one of an active expert.
        build_id: of the bundle that it fits.
        source: what it came from: lora, gguf (a LoRA), full or expert (a ready one).
        bytes: of its files.
        profiled: it was registered with prompts.
        report: what checks and compression found.
    """

    name: str
    generation: int
    state: Literal["registering", "ready", "failed", "collected"]
    serving: bool
    build_id: str
    source: str | None
    bytes: int
    max_rank: int | None
    relative_error: float | None
    profiled: bool
    report: Mapping[str, Any]
    job: str | None
    created_at: float | None


class GenerationList(Answer):
    """Generations of one expert, newest first."""

    object: Literal["list"] = "list"
    data: list[GenerationAnswer]
    has_more: bool


class ExpertDetail(ExpertAnswer):
    """One expert with its aliases and newest generations; the rest is at `…/generations`."""

    aliases: list[str]
    generations: list[GenerationAnswer]


class RegisteredAnswer(ExpertAnswer):
    """A registration that ended well while its client waited.

    Attributes:
        job: what made it.
        new_generation: what it made; not `generation` where it was not to be activated.
        report: what its checks and its compression found.
    """

    job: str
    new_generation: int
    report: Mapping[str, Any]


class JobFault(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobAnswer(Answer):
    """One piece of work.

    Attributes:
        stage: fetch, check, compress, route, store, try, publish or build.
        tensor: the parameter at hand.
        attempt: how often it was begun.
        cancelling: it will stop at the next chance.
        result: what came of it.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_JOB]})

    id: str
    object: Literal["job"] = "job"
    kind: Literal["register", "reprofile", "rebuild"]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    name: str | None
    generation: int | None
    percent: float
    stage: str
    tensor: str
    eta_seconds: float | None
    attempt: int
    cancelling: bool
    created_at: float | None
    started_at: float | None
    ended_at: float | None
    error: JobFault | None
    result: Mapping[str, Any] | None


class JobList(Answer):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool


class AliasAnswer(Answer):
    """Another name of an expert."""

    object: Literal["alias"] = "alias"
    alias: str
    expert: str


class AliasList(Answer):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[AliasAnswer]


class DeletedAnswer(Answer):
    """What is gone."""

    id: str
    deleted: Literal[True] = True


class AuditAnswer(Answer):
    """One change, or refused change.

    Attributes:
        actor: the admin key's label, or digits of its hash; "system" for the server itself.
        address: the client's.
        revision: of the catalogue afterwards.
    """

    id: int
    at: float
    actor: str
    address: str
    action: str
    target: str
    result: str
    revision: int
    detail: Mapping[str, Any]


class AuditList(Answer):
    """Some of the log, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditAnswer]
    has_more: bool


class BundleAnswer(Answer):
    """One bundle.

    Attributes:
        state: staged: built and not served yet; active: served; superseded; failed.
        rebuilt: the registry made it, so that every replica can fetch it.
        returnable: it was superseded, and can serve again with what served then.
    """

    build_id: str
    name: str
    state: Literal["staged", "active", "superseded", "failed"]
    rebuilt: bool
    returnable: bool
    created_at: float | None


class BundleList(Answer):
    """The one that serves, then those that did: first the one that was replaced last."""

    object: Literal["list"] = "list"
    data: list[BundleAnswer]


class ReplicaAnswer(Answer):
    """One server process as it last reported itself."""

    id: str
    url: str
    beat: int
    revision: int
    build_id: str
    leases: list[str]
    seen_at: float | None


class RegistryAnswer(Answer):
    """The registry as this replica sees it.

    Attributes:
        revision: of the catalogue; every change advances it.
        served_revision: of what this replica serves.
        broken: "name@generation" → why this replica cannot serve it; it is tried again.
        writable: changes are accepted; else `problem` says why not.
    """

    object: Literal["registry"] = "registry"
    revision: int
    served_revision: int
    build_id: str
    replica: str
    replicas: list[ReplicaAnswer]
    broken: Mapping[str, str]
    writable: bool
    problem: str


class CollectedAnswer(Answer):
    """What garbage collection gave up."""

    object: Literal["collected"] = "collected"
    generations: list[str]
    blobs: int
    bytes: int
