"""The words of the registry: what the catalogue keeps and hands out. Plain frozen data; knows no database.

A *generation* is one immutable version of one expert: its files lie in the blob store under their digests. A
*router generation* is the same for the router. A *snapshot* is what every replica shall serve at one revision.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from experts.bundle_manifest import EXPERT_FILES, ExpertSource, ExpertSummary, FileEntry
from experts.compression import CompressionSpec

Files = Mapping[str, FileEntry]
"""File name, or relative POSIX path, → digest and size."""

EXPERT_REPORT = EXPERT_FILES[1]
"""Of a generation's files the one that tells how it was compressed."""

GenerationState = Literal["registering", "ready", "failed", "collected"]
"""collected: its files were given up by garbage collection; it can serve no more."""

ExpertState = Literal["active", "disabled", "retired"]
"""disabled: kept, and served again at once; retired: its name may be given to another expert."""

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JobKind = Literal["register", "reprofile", "rebuild"]
TrialKind = Literal["canary", "shadow"]

ENDED: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks for a change, for the audit log.

    Attributes:
        name: the admin key's label or id, never the key; "system" for the server's own.
        address: the client's address; empty for the server itself.
    """

    name: str = "system"
    address: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One immutable version of one expert.

    Attributes:
        number: unique for its name for ever, ascending.
        build_id: the bundle against whose shared expert it was computed; it fits no other.
        files: expert.safetensors and expert.json; empty while registering and when failed.
        profile: the router features of its prompts, (prompts × forms, d) float32 under `features`, with `forms`.
        prompts: the prompts themselves, a JSON list of strings.
        origin: the fine-tune as it came, where it was kept.
        report: what checks and compression found, for people.
        job: id of the job that made it; None where it came with the bundle.
    """

    name: str
    number: int
    build_id: str
    state: GenerationState
    files: Files = field(default_factory=dict)
    source: ExpertSource | None = None
    compression: CompressionSpec | None = None
    summary: ExpertSummary | None = None
    profile: FileEntry | None = None
    prompts: FileEntry | None = None
    origin: Files = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    job: str | None = None
    created: datetime | None = None


@dataclass(frozen=True, slots=True)
class RouterGeneration:
    """One immutable version of the router.

    Attributes:
        number: unique for ever, ascending over all bundles.
        profiles: expert → the generation whose profile the router has of it.
        files: router.safetensors and router.json.
        reason: what made it, for people: "built", "registered a@3", "reprofiled a@2", "rebuilt".
    """

    number: int
    build_id: str
    profiles: Mapping[str, int]
    files: Files
    reason: str
    created: datetime | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """A generation that is tried out beside the one that serves.

    Attributes:
        kind: canary: that share of routed requests is answered with it, and with its router; shadow: its
            router's gates are computed for that share of routed requests, compared and thrown away.
        router: the router generation that knows it; None keeps the current router.
        percent: of routed requests, in (0, 100].
    """

    name: str
    generation: int
    kind: TrialKind
    percent: float
    router: int | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """One name and what it stands for now.

    Attributes:
        generation: the one that serves, or would if it were enabled; None before the first is ready.
        pinned: registrations make new generations ready, but do not put them live.
    """

    name: str
    state: ExpertState
    generation: int | None
    pinned: bool = False
    trial: Trial | None = None
    created: datetime | None = None
    updated: datetime | None = None


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle: a shared expert and what belongs to it.

    Attributes:
        manifest: manifest.json as text, as it was built.
        files: of a bundle that the registry built: everything, so that any replica can have it. Empty for one
            that every replica has on its own disk.
        state: staged: built and not served yet; active: the one that is served; superseded; failed.
        left: the revision at which another took its place, while what served then is still there; else None.
    """

    build_id: str
    name: str
    manifest: str
    files: Files = field(default_factory=dict)
    state: Literal["staged", "active", "superseded", "failed"] = "active"
    left: int | None = None
    created: datetime | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a replica serves at one revision; read in one transaction.

    Attributes:
        experts: name → the generation that serves; active experts only.
        router: None where requests must name their experts. It may know experts that are not active: a replica
            lets it choose `among` those that are.
        trials: with their generations in `trial_generations` and routers in `trial_routers`.
        aliases: alias → expert name.
    """

    revision: int
    bundle: BundleRecord
    experts: Mapping[str, Generation]
    router: RouterGeneration | None
    trials: tuple[Trial, ...] = ()
    trial_generations: tuple[Generation, ...] = ()
    trial_routers: Mapping[int, RouterGeneration] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes:
        percent: 0 to 100, never falling.
        stage: one word of what is being done: fetch, check, compress, route, store, try, publish, build.
        tensor: the parameter at hand; empty where none is.
        eta_seconds: until it is done, as far as can be told.
    """

    percent: float = 0.0
    stage: str = ""
    tensor: str = ""
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed, as a client is told."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work that outlives requests, processes and servers.

    Attributes:
        request: what was asked for, as JSON; enough to begin anew.
        name, generation: of the expert that it makes; None for other kinds.
        attempt: how often it was claimed; a fence: what an earlier attempt reports counts for nothing.
        owner: the replica that runs it.
        cancelling: its worker shall stop at the next chance.
        result: what came of it, as JSON, once it has succeeded.
    """

    id: str
    kind: JobKind
    state: JobState
    request: Mapping[str, Any]
    actor: Actor
    name: str | None = None
    generation: int | None = None
    idempotency_key: str | None = None
    attempt: int = 0
    owner: str | None = None
    cancelling: bool = False
    progress: Progress = Progress()
    failure: JobFailure | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    created: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None


@dataclass(frozen=True, slots=True)
class Replica:
    """One server process as it last reported itself.

    Attributes:
        beat: counts up while it lives. Whoever watches tells a dead replica by a count that stands still on the
            watcher's own monotonic clock; wall clocks jump.
        revision: what it serves, all experts of it loaded.
        leases: generations that its requests use, as "name@number".
    """

    id: str
    beat: int
    revision: int
    build_id: str
    url: str = ""
    leases: tuple[str, ...] = ()
    seen: datetime | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change, or refused change: who, what, when, from where, with what result."""

    id: int
    at: datetime
    actor: Actor
    action: str
    target: str
    result: str
    revision: int
    detail: Mapping[str, Any] = field(default_factory=dict)


def new_id(kind: str) -> str:
    """A fresh id such as `job-3f…`, that nobody guesses."""
    return f"{kind}-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Pruned:
    """Rows of the catalogue that were removed, of each kind."""

    jobs: int = 0
    audit: int = 0
    generations: int = 0
    routers: int = 0

    @property
    def rows(self) -> int:
        """All together."""
        return self.jobs + self.audit + self.generations + self.routers

    def __add__(self, other: "Pruned") -> "Pruned":
        """Of both."""
        return Pruned(
            self.jobs + other.jobs,
            self.audit + other.audit,
            self.generations + other.generations,
            self.routers + other.routers,
        )
