"""The life of a job: submitted, claimed by one replica, reported on, ended; one runs at a time."""

import hashlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update

from experts.bundle_manifest import check_name
from experts.errors import IdempotencyError, JobLostError, TransitionError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected
from experts.registry.catalogue.ending import OPEN, cancel_job, check_fence, end_job, give_back
from experts.registry.catalogue.queueing import by_key, queue
from experts.registry.catalogue.reading import job_row
from experts.registry.catalogue.rows import dumps, job_of, now, progress_row
from experts.registry.records import ENDED, Actor, Job, JobFailure, JobKind, Progress


class Jobs(Connected):
    """Changes of jobs; each is one transaction. All raise CatalogueError where the database cannot be written."""

    def submit(
        self,
        kind: JobKind,
        request: Mapping[str, Any],
        actor: Actor,
        *,
        name: str | None = None,
        replace: bool = False,
        expected: int | None = None,
        precondition: bool = False,
        idempotency_key: str | None = None,
        limit: int,
    ) -> Job:
        """Queue a job; a registration gets the number of its generation at once.

        Args:
            request: what is asked for, as JSON.
            name: the expert; a registration needs one.
            replace: an expert of that name may be there.
            expected: the generation that it is at; looked at again when the new one goes live.
            precondition: an expert that is missing is a conflict with `expected` too.
            idempotency_key: the actor's word for this request; sent again, it gives the same job again.
            limit: jobs that may run or wait, this one included.

        Raises:
            BundleError: the name is not allowed.
            DuplicateExpertError: the name is in use, as an expert without `replace` or as an alias or the bundle.
            UnknownExpertError, GenerationConflictError: not what was expected.
            TransitionError: the same expert is being registered, or the bundle rebuilt, already.
            RegistryFullError: too many jobs run or wait.
            IdempotencyError: the key was used for another request.
        """
        if name is not None and kind == "register":
            check_name(name)
        fingerprint = hashlib.sha256(
            dumps([kind, _ordered(request), name, replace, expected, precondition]).encode()
        ).hexdigest()
        with self._change() as change:
            if idempotency_key is not None:
                known = by_key(change, actor, idempotency_key)
                if known is not None and known.fingerprint != fingerprint:
                    raise IdempotencyError(
                        "this idempotency key was used for another request; choose a new one"
                    )
                if known is not None:
                    return job_of(known)
            asked = {
                "kind": kind,
                "request": dict(request),
                "fingerprint": fingerprint,
                "replaces": replace,
                "expected": expected,
                "name": name,
            }
            row = queue(change, actor, asked, limit, precondition, idempotency_key)
            change.note(actor, kind, name or row.id, {"job": row.id, "generation": row.generation})
            return job_of(row)

    def claim(self, owner: str) -> Job | None:
        """Take the job that waits longest, for this replica to run; None while one runs or none waits."""
        columns = tables.jobs.c
        with self._database.read() as connection:
            states = set(connection.execute(select(columns.state).where(columns.state.in_(OPEN))).scalars())
        # Most looks find nothing, and need no lock to see it.
        if states != {"queued"}:
            return None
        with self._change() as change:
            run = change.connection.execute
            if run(select(columns.id).where(columns.state == "running")).first() is not None:
                return None
            row = run(
                select(tables.jobs).where(columns.state == "queued").order_by(columns.turn).limit(1)
            ).one_or_none()
            if row is None:
                return None
            values = {
                "state": "running",
                "slot": 1,
                "owner": owner,
                "attempt": row.attempt + 1,
                "started": row.started or now(),
            }
            run(update(tables.jobs).where(columns.id == row.id).values(values))
            detail = {"job": row.id, "owner": owner, "attempt": row.attempt + 1}
            change.note(Actor(), "claim", row.name or row.id, detail)
            return job_of(job_row(change.connection, row.id))

    def progress(self, job_id: str, attempt: int, progress: Progress) -> bool:
        """Say how far a job is; whether it shall stop. Makes no revision.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more.
        """
        columns = tables.jobs.c
        with self._database.write() as connection:
            row = job_row(connection, job_id)
            check_fence(row, attempt)
            value = progress_row(progress)
            value["percent"] = max(value["percent"], row.progress["percent"])
            written = connection.execute(
                update(tables.jobs)
                .where(columns.id == job_id, columns.attempt == attempt, columns.state == "running")
                .values(progress=value)
                .returning(columns.cancelling)
            ).scalar_one_or_none()
            if written is None:
                raise JobLostError(f"the job {job_id} ended meanwhile")
            return bool(written)

    def fail(
        self, job_id: str, attempt: int, failure: JobFailure, report: Mapping[str, Any] | None = None
    ) -> Job:
        """End a job without success; its generation is failed, with what was found.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more.
        """
        with self._change() as change:
            row = job_row(change.connection, job_id)
            if row.state == "failed" and row.attempt == attempt:
                return job_of(row)
            check_fence(row, attempt)
            return job_of(end_job(change, row, "failed", failure=failure, report=report))

    def cancel(self, job_id: str, actor: Actor) -> Job:
        """Cancel a job that waits at once; tell one that runs to stop, which its worker does soon.

        Raises:
            RecordNotFoundError: there is no such job.
            TransitionError: it has ended.
        """
        with self._change() as change:
            row = job_row(change.connection, job_id)
            if row.state in ENDED:
                raise TransitionError(f"the job {job_id} has ended ({row.state}); nothing is left to cancel")
            return job_of(cancel_job(change, row, actor, "cancelled"))

    def cancelled(self, job_id: str, attempt: int) -> Job:
        """A job that was to stop has stopped.

        Raises:
            RecordNotFoundError: there is no such job.
            JobLostError: this attempt does not run any more.
        """
        with self._change() as change:
            row = job_row(change.connection, job_id)
            if row.state == "cancelled" and row.attempt == attempt:
                return job_of(row)
            check_fence(row, attempt)
            return job_of(end_job(change, row, "cancelled"))

    def retry(self, job_id: str, actor: Actor, *, limit: int | None = None) -> Job:
        """A new job with the request of one that failed or was cancelled, and a new generation.

        Raises:
            RecordNotFoundError: there is no such job.
            TransitionError: it is not over, or succeeded; or as `submit`.
            DuplicateExpertError, UnknownExpertError, GenerationConflictError, RegistryFullError: as `submit`.
        """
        with self._change() as change:
            old = job_row(change.connection, job_id)
            if old.state not in ("failed", "cancelled"):
                raise TransitionError(
                    f"the job {job_id} is {old.state}; only a failed or cancelled one is retried"
                )
            asked = {
                key: getattr(old, key)
                for key in ("kind", "request", "fingerprint", "replaces", "expected", "name")
            }
            row = queue(change, actor, asked, limit, False, None)
            detail = {"job": row.id, "of": job_id, "generation": row.generation}
            change.note(actor, "retry", row.name or row.id, detail)
            return job_of(row)

    def requeue(
        self,
        owner: str,
        attempts: int | None,
        *,
        failure: JobFailure | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> list[Job]:
        """Give back what a replica ran: queued again, failed once so many attempts died, or cancelled as asked.

        Args:
            attempts: None where nothing died: it is given back in good order, however often that happens.
            failure: why a job fails by it; that its server died if not given.
            report: of the generation that fails by it.
        """
        columns = tables.jobs.c
        with self._change() as change:
            rows = change.connection.execute(
                select(tables.jobs).where(columns.state == "running", columns.owner == owner)
            ).all()
            return [job_of(give_back(change, row, attempts, failure, report)) for row in rows]


def _ordered(value: Any) -> Any:
    """The same value whatever the order of its keys."""
    if isinstance(value, Mapping):
        return {str(key): _ordered(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    return value
