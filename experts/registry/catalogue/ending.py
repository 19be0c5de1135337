"""How jobs end, or go back to the queue."""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Row, or_, select, update

from experts.errors import JobLostError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change, Connected
from experts.registry.catalogue.reading import job_row
from experts.registry.catalogue.rows import failure_row, job_of, now
from experts.registry.records import Actor, Job, JobFailure

OPEN = ("queued", "running")


def check_fence(row: Row[Any], attempt: int) -> None:
    """Whether an attempt may still report.

    Raises:
        JobLostError: it may not.
    """
    if row.state != "running" or row.attempt != attempt:
        raise JobLostError(
            f"attempt {attempt} of the job {row.id} counts for nothing: it is {row.state} at attempt {row.attempt}"
        )


class Concluding(Connected):
    """How the one change is made that a job was for."""

    def _conclude(self, job_id: str, attempt: int, make: Callable[[Change, Row[Any]], Row[Any]]) -> Job:
        """Make a job's change, which ends it, if this attempt still runs it. Done again, nothing happens.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more, or was told to stop, which it has by this.
        """
        with self._change() as change:
            row = job_row(change.connection, job_id)
            if row.state == "succeeded" and row.attempt == attempt:
                return job_of(row)
            check_fence(row, attempt)
            if not row.cancelling:
                return job_of(make(change, row))
            end_job(change, row, "cancelled")
        # Raised once that is committed.
        raise JobLostError(f"the job {job_id} was cancelled")


def end_job(
    change: Change,
    row: Row[Any],
    state: str,
    *,
    failure: JobFailure | None = None,
    report: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    actor: Actor | None = None,
) -> Row[Any]:
    """End a job; unless it succeeded, the generation that it was to make has failed."""
    values: dict[str, Any] = {"state": state, "slot": None, "ended": now()}
    if state == "succeeded":
        values |= {
            "result": dict(result or {}),
            "progress": {**row.progress, "percent": 100.0, "eta_seconds": 0.0},
        }
    elif row.generation is not None:
        columns = tables.generations.c
        found = dict(report or {}) or {"error": failure_row(failure) if failure else {"code": state}}
        change.connection.execute(
            update(tables.generations)
            .where(columns.name == row.name, columns.number == row.generation)
            .values(state="failed", report=found)
        )
    if failure is not None:
        values["failure"] = failure_row(failure)
    change.connection.execute(update(tables.jobs).where(tables.jobs.c.id == row.id).values(values))
    _let_go(change, row.id)
    detail: dict[str, Any] = {"job": row.id, "generation": row.generation}
    if failure is not None:
        detail["error"] = failure_row(failure)
    who = actor or Actor(row.actor, row.address)
    change.note(
        who, f"{row.kind}.{state}", row.name or row.id, detail, "ok" if failure is None else failure.code
    )
    return job_row(change.connection, row.id)


def cancel_job(change: Change, row: Row[Any], actor: Actor, why: str) -> Row[Any]:
    """Cancel an open job as far as that can be done here."""
    if row.state == "queued":
        return end_job(
            change, row, "cancelled", report={"error": {"code": "cancelled", "message": why}}, actor=actor
        )
    if not row.cancelling:
        change.connection.execute(
            update(tables.jobs).where(tables.jobs.c.id == row.id).values(cancelling=True)
        )
        change.note(actor, "cancel", row.name or row.id, {"job": row.id, "why": why})
    return job_row(change.connection, row.id)


def end_jobs_of(change: Change, name: str, why: str) -> list[str]:
    """Cancel the open jobs of an expert; their ids."""
    columns = tables.jobs.c
    rows = change.connection.execute(
        select(tables.jobs).where(columns.name == name, columns.state.in_(OPEN)).order_by(columns.turn)
    ).all()
    for row in rows:
        cancel_job(change, row, Actor(), why)
    return [row.id for row in rows]


def give_back(
    change: Change,
    row: Row[Any],
    attempts: int | None,
    failure: JobFailure | None,
    report: Mapping[str, Any] | None,
) -> Row[Any]:
    """A job whose attempt ended by itself: queued again, failed once so many died, or cancelled as asked.

    Args:
        attempts: None where it did not die, which counts for nothing.
        failure, report: of a job that fails by it.
    """
    if row.cancelling:
        return end_job(change, row, "cancelled", actor=Actor())
    deaths = row.deaths + (attempts is not None)
    if attempts is not None and deaths >= attempts:
        told = failure or JobFailure(
            "request_failed", f"The server that ran it died, {deaths} times in all; nothing was registered."
        )
        return end_job(change, row, "failed", failure=told, report=report, actor=Actor())
    again = {"state": "queued", "slot": None, "owner": None, "deaths": deaths}
    change.connection.execute(update(tables.jobs).where(tables.jobs.c.id == row.id).values(again))
    _let_go(change, row.id)
    detail = {"job": row.id, "attempt": row.attempt, "deaths": deaths, "owner": row.owner}
    change.note(Actor(), "requeue", row.name or row.id, detail)
    return job_row(change.connection, row.id)


def _let_go(change: Change, job_id: str) -> None:
    """What a job's worker had stored and not published is nobody's now."""
    holder = tables.pins.c.holder
    change.connection.execute(
        tables.pins.delete().where(or_(holder == job_id, holder.startswith(f"{job_id}/", autoescape=True)))
    )
