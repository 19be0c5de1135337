"""Rows of the catalogue ↔ the registry's words."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Row

from experts.bundle_manifest import ExpertSource, ExpertSummary, FileEntry
from experts.compression import CompressionSpec
from experts.registry.records import (
    Actor,
    AuditEntry,
    BundleRecord,
    Expert,
    Files,
    Generation,
    Job,
    JobFailure,
    Progress,
    Replica,
    RouterGeneration,
    Trial,
)


def dumps(value: Any) -> str:
    """JSON that every database takes: what is not a finite number becomes a string."""
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def now() -> datetime:
    """The wall clock, for people; nothing is decided by it but which old rows are pruned."""
    return datetime.now(UTC)


def model_row(model: BaseModel | None) -> dict[str, Any] | None:
    """A model as JSON."""
    return None if model is None else model.model_dump(mode="json")


def files_row(files: Files) -> dict[str, Any]:
    """Files as JSON."""
    return {name: entry.model_dump(mode="json") for name, entry in files.items()}


def files_of(value: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Files that were kept as JSON."""
    return {name: FileEntry.model_validate(entry) for name, entry in value.items()}


def generation_row(generation: Generation) -> dict[str, Any]:
    """All columns of a generation but its key and when it was made."""
    return {
        "build_id": generation.build_id,
        "state": generation.state,
        "files": files_row(generation.files),
        "source": model_row(generation.source),
        "compression": model_row(generation.compression),
        "summary": model_row(generation.summary),
        "profile": model_row(generation.profile),
        "prompts": model_row(generation.prompts),
        "origin": files_row(generation.origin),
        "report": dict(generation.report),
        "job": generation.job,
    }


def generation_of(row: Row[Any]) -> Generation:
    """A row of `generations`."""
    return Generation(
        name=row.name,
        number=row.number,
        build_id=row.build_id,
        state=row.state,
        files=files_of(row.files),
        source=None if row.source is None else ExpertSource.model_validate(row.source),
        compression=None if row.compression is None else CompressionSpec.model_validate(row.compression),
        summary=None if row.summary is None else ExpertSummary.model_validate(row.summary),
        profile=_entry(row.profile),
        prompts=_entry(row.prompts),
        origin=files_of(row.origin),
        report=row.report,
        job=row.job,
        created=row.created,
    )


def router_of(row: Row[Any]) -> RouterGeneration:
    """A row of `routers`."""
    return RouterGeneration(
        number=row.number,
        build_id=row.build_id,
        profiles=row.profiles,
        files=files_of(row.files),
        reason=row.reason,
        created=row.created,
    )


def bundle_of(row: Row[Any]) -> BundleRecord:
    """A row of `bundles`."""
    return BundleRecord(
        build_id=row.build_id,
        name=row.name,
        manifest=row.manifest,
        files=files_of(row.files),
        state=row.state,
        left=row.way_back["revision"] if row.way_back is not None else None,
        created=row.created,
    )


def trial_row(trial: Trial | None) -> dict[str, Any] | None:
    """A trial as JSON; its expert's name is the row's."""
    if trial is None:
        return None
    return {
        "generation": trial.generation,
        "kind": trial.kind,
        "percent": trial.percent,
        "router": trial.router,
    }


def expert_of(row: Row[Any]) -> Expert:
    """A row of `experts`."""
    return Expert(
        name=row.name,
        state=row.state,
        generation=row.generation,
        pinned=row.pinned,
        trial=None if row.trial is None else Trial(name=row.name, **row.trial),
        created=row.created,
        updated=row.updated,
    )


def progress_row(progress: Progress) -> dict[str, Any]:
    """Progress as JSON."""
    eta = progress.eta_seconds
    return {
        "percent": min(max(progress.percent, 0.0), 100.0),
        "stage": progress.stage,
        "tensor": progress.tensor,
        "eta_seconds": eta if eta is not None and math.isfinite(eta) else None,
    }


def job_of(row: Row[Any]) -> Job:
    """A row of `jobs`."""
    return Job(
        id=row.id,
        kind=row.kind,
        state=row.state,
        request=row.request,
        actor=Actor(row.actor, row.address),
        name=row.name,
        generation=row.generation,
        idempotency_key=row.idempotency_key,
        attempt=row.attempt,
        owner=row.owner,
        cancelling=row.cancelling,
        progress=Progress(**row.progress),
        failure=None if row.failure is None else JobFailure(**row.failure),
        result=row.result,
        created=row.created,
        started=row.started,
        ended=row.ended,
    )


def failure_row(failure: JobFailure) -> dict[str, Any]:
    """A failure as JSON."""
    return {"code": failure.code, "message": failure.message, "param": failure.param}


def replica_of(row: Row[Any]) -> Replica:
    """A row of `replicas`."""
    return Replica(
        id=row.id,
        beat=row.beat,
        revision=row.revision,
        build_id=row.build_id,
        url=row.url,
        leases=tuple(row.leases),
        seen=row.seen,
    )


def audit_of(row: Row[Any]) -> AuditEntry:
    """A row of `audit`."""
    return AuditEntry(
        id=row.id,
        at=row.at,
        actor=Actor(row.actor, row.address),
        action=row.action,
        target=row.target,
        result=row.result,
        revision=row.revision,
        detail=row.detail,
    )


def _entry(value: Mapping[str, Any] | None) -> FileEntry | None:
    return None if value is None else FileEntry.model_validate(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
