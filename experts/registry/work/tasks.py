"""What the worker process is told and what it answers. Knows no torch, so that the server can read it cheaply.

The server's side is trusted and may send any object. The process reads what strangers made: what comes back is
JSON of the models below and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from experts.bundle_manifest import ExpertSource, ExpertSummary, FileEntry
from experts.compression import CompressionSpec
from experts.registry.records import Files, Generation, RouterGeneration
from experts.registry.sources import FetchPolicy

BUNDLE = "bundle"
EXPERT = "expert"
ROUTER = "router"
SOURCE = "source"
"""Folders that tasks make below their own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may use.

    Attributes:
        threads: CPU threads; the process gives way to everything else that runs in any case.
        nbytes: memory of its own, mapped files that it only reads not counted; None is no limit.
    """

    threads: int = 1
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class StoreAt:
    """Where the blobs are; see `Blobs.open`."""

    url: str
    cache: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """The first thing that a process is told.

    Attributes:
        bundle: folder of the bundle, opened beforehand.
    """

    bundle: Path
    store: StoreAt
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """A fine-tune that is fetched first."""

    url: str
    policy: FetchPolicy


@dataclass(frozen=True, slots=True)
class Checks:
    """What an expert must be beyond readable.

    Attributes:
        signature: as it was sent; the one beside the files counts where there is none.
        keys: file of trusted keys; None takes unsigned sources.
        max_relative_error: what compression may lose of it, of its norm; None only reports it.
        max_norm_ratio: its norm over its siblings' median, either way.
        siblings: the experts that serve, by name.
        reports: expert.json of those of them whose summary tells no norm, as blobs.
    """

    signature: str | None = None
    keys: Path | None = None
    max_relative_error: float | None = None
    max_norm_ratio: float = 100.0
    siblings: Mapping[str, ExpertSummary] = field(default_factory=dict)
    reports: Mapping[str, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RegisterTask:
    """Fine-tune → files of an expert.

    Attributes:
        build_id: the bundle must be that build.
        source: a folder of this machine, or where to fetch one.
        foreign: the source was uploaded or fetched, and may hold nothing that an expert is not made of.
        folder: an empty one; everything that is made is below it.
        size: `rank` or `energy`; nothing is the bundle's own compression.
        keep: fine-tunes that are kept as they came.
    """

    bundle: Path
    build_id: str
    name: str
    source: Path | RemoteSource
    foreign: bool
    folder: Path
    size: Mapping[str, Any] = field(default_factory=dict)
    checks: Checks = Checks()
    keep: Literal["none", "lora", "all"] = "none"


@dataclass(frozen=True, slots=True)
class RouteTask:
    """An expert that is prepared → files of a router that knows it.

    One with features is known by them. One without is known by its weights, if it is not known by prompts of an
    earlier generation already.

    Attributes:
        router: the current one; None where there is none, and nothing is made.
        keep: names that stay routed, if they are.
        source: folder of the fine-tune; else the expert's own files tell what it does.
        expert: folder of the expert's files, or the blobs that they are.
        profile: features of its prompts, see `profiles`, as a local file or a blob; None without prompts.
        background: the same of neutral prompts, for the first expert that joins by its weights.
    """

    bundle: Path
    build_id: str
    name: str
    folder: Path
    router: RouterGeneration | None
    keep: frozenset[str]
    source: Path | None = None
    expert: Path | Files | None = None
    profile: Path | FileEntry | None = None
    background: Path | None = None


@dataclass(frozen=True, slots=True)
class StoreTask:
    """Put files into the blob store; their digests are pinned by now."""

    files: Mapping[Path, FileEntry]


@dataclass(frozen=True, slots=True)
class BundleTask:
    """A bundle over all current experts, with another shared expert; or one that lies on disk, looked at.

    Attributes:
        folder: an empty one; a built bundle is below its `bundle/`.
        experts: generations that serve.
        router: the current one.
        path: folder of a bundle that was built elsewhere over the same base; None builds one.
        base: folder of the base; None works it out.
        request: `merge` and `prompts`, as they were asked for.
    """

    bundle: Path
    build_id: str
    folder: Path
    experts: tuple[Generation, ...]
    router: RouterGeneration | None
    path: Path | None = None
    base: Path | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


Task = RegisterTask | RouteTask | StoreTask | BundleTask


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prepared(_Message):
    """What became of a `RegisterTask`: files below its folder, and what there is to know about them.

    Attributes:
        files: expert.safetensors and expert.json, below `expert/`. A fetched fine-tune is below `source/`.
        origin: the fine-tune's files where they are kept, below its own folder.
        report: totals of compression and checks, for people.
    """

    files: dict[str, FileEntry]
    source: ExpertSource
    origin: dict[str, FileEntry] = Field(default_factory=dict)
    compression: CompressionSpec
    summary: ExpertSummary
    report: dict[str, Any]


class Routed(_Message):
    """What became of a `RouteTask`.

    Attributes:
        files: router.safetensors and router.json, below `router/`; none where the current router stays.
        names: experts that it chooses among.
        by: how the expert is known: by its prompts, by its weights, kept as it was, or not at all.
    """

    files: dict[str, FileEntry] = Field(default_factory=dict)
    names: tuple[str, ...] = ()
    by: Literal["prompts", "weights", "kept", "nothing"] = "nothing"


class Stored(_Message):
    """A `StoreTask` is done."""

    count: int


class Built(_Message):
    """What became of a `BundleTask`."""

    build_id: str
    experts: int


class Failure(_Message):
    """Why a task failed.

    Attributes:
        kind: name of a class of `experts.errors`; "memory" where the limit was reached; "fault" for anything else.
    """

    kind: str
    message: str


class Step(_Message):
    """How far a task is.

    Attributes:
        stage: one of `Progress.stage`.
        share: of the stage, 0 to 1.
    """

    stage: str
    share: float = Field(ge=0, le=1)
    tensor: str = ""


class Message(_Message):
    """One line from the process: ready for a task, a step of one, its end.

    Attributes:
        nbytes: memory of the process's own by now, where it is ready.
    """

    nbytes: int | None = None
    step: Step | None = None
    failure: Failure | None = None
    answer: Prepared | Routed | Stored | Built | None = None


Answer = Prepared | Routed | Stored | Built


def entry_script() -> Path:
    """The script that the process runs; it sets limits before anything large is imported."""
    return Path(__file__).with_name("entry.py")
