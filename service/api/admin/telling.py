"""The registry's records as answers."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fastapi import Response

from experts.registry.records import (
    ENDED,
    AuditEntry,
    BundleRecord,
    Generation,
    Job,
    Replica,
    Trial,
)
from service.api.wire.answers import Answer
from service.api.wire.registry import (
    AuditAnswer,
    BundleAnswer,
    GenerationAnswer,
    JobAnswer,
    JobFault,
    RegistryAnswer,
    ReplicaAnswer,
    TrialAnswer,
)
from service.registrar import ExpertView, RegistryState

_SOON = 1.0
"""Seconds after which a job is worth another look."""


def seconds(at: datetime | None) -> float | None:
    """A time as Unix seconds."""
    return None if at is None else round(at.timestamp(), 3)


def json_answer(answer: Answer, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """One answer as JSON."""
    return Response(answer.dump(), status, headers, media_type="application/json")


def etag(generation: int) -> dict[str, str]:
    """The header that `If-Match` takes; none before the first generation."""
    return {"ETag": f'"{generation}"'} if generation else {}


def trial_answer(trial: Trial) -> TrialAnswer:
    """One trial."""
    return TrialAnswer(
        generation=trial.generation,
        kind=trial.kind,
        percent=trial.percent,
        router_generation=trial.router,
    )


def expert_fields(view: ExpertView) -> dict[str, Any]:
    """The fields of `ExpertAnswer`."""
    return {
        "name": view.name,
        "generation": view.generation or None,
        "state": view.state,
        "loaded": view.loaded,
        "routed": view.routed,
        "leases": view.leases,
        "bytes": view.nbytes,
        "max_rank": view.max_rank,
        "resident": view.resident,
        "pinned": view.pinned,
        "trial": None if view.trial is None else trial_answer(view.trial),
        "in_memory": {str(number): leases for number, leases in (view.generations or {}).items()},
    }


def serving(view: ExpertView) -> int | None:
    """The generation of an expert that serves."""
    return view.generation or None if view.state == "active" else None


def generation_answer(generation: Generation, current: int | None) -> GenerationAnswer:
    """One generation, beside the one of its expert that serves."""
    summary = generation.summary
    return GenerationAnswer(
        name=generation.name,
        generation=generation.number,
        state=generation.state,
        serving=generation.number == current,
        build_id=generation.build_id,
        source=None if generation.source is None else generation.source.kind,
        bytes=sum(entry.nbytes for entry in generation.files.values()),
        max_rank=None if summary is None else summary.rank_max,
        relative_error=None if summary is None else _finite(summary.relative_error),
        profiled=generation.profile is not None,
        report=generation.report,
        job=generation.job,
        created_at=seconds(generation.created),
    )


def job_answer(job: Job) -> JobAnswer:
    """One job."""
    failure = job.failure
    progress = job.progress
    return JobAnswer(
        id=job.id,
        kind=job.kind,
        state=job.state,
        name=job.name,
        generation=job.generation,
        percent=100.0 if job.state == "succeeded" else round(progress.percent, 2),
        stage=progress.stage,
        tensor=progress.tensor,
        eta_seconds=None
        if progress.eta_seconds is None or job.state in ENDED
        else round(progress.eta_seconds, 2),
        attempt=job.attempt,
        cancelling=job.cancelling,
        created_at=seconds(job.created),
        started_at=seconds(job.started),
        ended_at=seconds(job.ended),
        error=None
        if failure is None
        else JobFault(code=failure.code, message=failure.message, param=failure.param),
        result=dict(job.result) if job.state == "succeeded" else None,
    )


def accepted(job: Job) -> Response:
    """202: the job, where to find it, and when to look again."""
    return json_answer(job_answer(job), 202, {"Location": job_path(job), **retry_after(job)})


def job_path(job: Job) -> str:
    """Where a job is looked at."""
    return f"/admin/jobs/{job.id}"


def retry_after(job: Job) -> dict[str, str]:
    """When another look makes sense; nothing for a job that has ended."""
    if job.state in ENDED:
        return {}
    return {"Retry-After": str(max(1, math.ceil(job.progress.eta_seconds or _SOON)))}


def audit_answer(entry: AuditEntry) -> AuditAnswer:
    """One line of the audit log."""
    return AuditAnswer(
        id=entry.id,
        at=round(entry.at.timestamp(), 3),
        actor=entry.actor.name,
        address=entry.actor.address,
        action=entry.action,
        target=entry.target,
        result=entry.result,
        revision=entry.revision,
        detail=entry.detail,
    )


def bundle_answer(bundle: BundleRecord) -> BundleAnswer:
    """One bundle."""
    return BundleAnswer(
        build_id=bundle.build_id,
        name=bundle.name,
        state=bundle.state,
        rebuilt=bool(bundle.files),
        returnable=bundle.left is not None,
        created_at=seconds(bundle.created),
    )


def registry_answer(state: RegistryState) -> RegistryAnswer:
    """The registry as this replica sees it."""
    return RegistryAnswer(
        revision=state.revision,
        served_revision=state.served_revision,
        build_id=state.build_id,
        replica=state.replica,
        replicas=[_replica(one) for one in state.replicas],
        broken=state.broken,
        writable=state.writable,
        problem=state.problem,
    )


def page(items: Sequence[Any], limit: int) -> tuple[Sequence[Any], bool]:
    """Of one item more than asked for: those of the page, and whether there are more."""
    return items[:limit], len(items) > limit


def _replica(replica: Replica) -> ReplicaAnswer:
    return ReplicaAnswer(
        id=replica.id,
        url=replica.url,
        beat=replica.beat,
        revision=replica.revision,
        build_id=replica.build_id,
        leases=list(replica.leases),
        seen_at=seconds(replica.seen),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
