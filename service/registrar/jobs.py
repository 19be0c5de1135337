"""Registrations and other work that takes its time: queued, looked at, stopped."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from experts.registry.records import ENDED, Actor, Job, JobState
from service.registrar.changing import UNUSABLE, Changing
from service.registrar.checks import Registration, check_registration
from service.registrar.translate import translated

_WATCH_SECONDS = 0.05
"""Between two looks at a job that somebody waits for; one statement of the database each."""


class JobChanges(Changing):
    """See `Registrar`."""

    async def submit(self, asked: Registration, actor: Actor, key: str | None = None) -> Job:
        """Queue a registration. The same idempotency key with the same request gives the same job.

        Raises:
            InvalidRequestError: an impossible name, source, or prompts that cannot be profiled.
            PathNotAllowedError, FolderNotFoundError, SourceNotAllowedError, RecordNotFoundError: of the source.
            ConflictError, PreconditionFailedError: the name is taken, or its generation is not the expected one.
            WrongStateError: another registration of the name is queued or runs.
            IdempotencyKeyError: the key was sent with another request.
            QueueFullError: too many jobs wait.
        """
        check_registration(asked, self._live.bundle_name, routed=self._follower.routed)
        self._check_writable()
        known = await self._sent_before(asked, actor, key)
        if known is not None:
            return known
        with translated():
            request = await self._calls(lambda: self.sources.admit(asked.request()))
        return await self._submit(
            "register",
            request,
            actor,
            key,
            name=asked.name,
            replace=asked.replace,
            expected=asked.expected_generation,
            precondition=asked.precondition,
        )

    async def _sent_before(self, asked: Registration, actor: Actor, key: str | None) -> Job | None:
        """The job of the same request under the same key: its answer was lost, and its source may be gone by now."""
        job = None if key is None else await self._ask(self.catalogue.job_of_key, actor, key)
        if job is None or job.kind != "register":
            return None
        before = {field: value for field, value in job.request.items() if field != "files"}
        return job if before == json.loads(json.dumps(asked.request())) else None

    async def rebuild(self, body: Mapping[str, Any], actor: Actor, key: str | None = None) -> Job:
        """Queue a bundle that takes the served one's place: rebuilt over all experts, or one that lies on disk.

        Args:
            body: `merge`, `base`, `prompts`, or `path`, as JSON.
            actor: who asks.
            key: idempotency key.

        Raises:
            WrongStateError, IdempotencyKeyError, QueueFullError: as `submit`.
        """
        return await self._submit("rebuild", dict(body), actor, key)

    async def job(self, job_id: str) -> Job:
        """One job; where it has succeeded, as soon as this replica serves what it made, within bounds.

        Raises:
            RecordNotFoundError: there is none of that id.
        """
        job = await self._look(job_id)
        if job.state == "succeeded":
            await self.follow()
        return job

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        name: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> Sequence[Job]:
        """Jobs, newest first; `after` is the id of the last one of the page before."""
        return await self._ask(lambda: self.catalogue.jobs(state=state, name=name, limit=limit, after=after))

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job when it has ended and, if it succeeded, this replica serves what it made; or as it is in time."""
        deadline = time.monotonic() + seconds
        job = await self._look(job_id)
        while job.state not in ENDED and time.monotonic() < deadline:
            await asyncio.sleep(min(_WATCH_SECONDS, max(deadline - time.monotonic(), 0)))
            job = await self._look(job_id)
        if job.state == "succeeded":
            await self.follow()
        return job

    async def watch(self, job_id: str) -> AsyncIterator[Job]:
        """The job as it is, and again whenever it has changed, until it has ended."""
        seen: Job | None = None
        while seen is None or seen.state not in ENDED:
            with contextlib.suppress(*UNUSABLE):
                job = await self._look(job_id)
                if job != seen:
                    seen = job
                    if job.state == "succeeded":
                        await self.follow()
                    yield job
                    continue
            await asyncio.sleep(_WATCH_SECONDS)

    async def cancel(self, job_id: str, actor: Actor) -> Job:
        """Stop a job; a queued one at once, a running one at its next chance.

        Raises:
            RecordNotFoundError: there is none of that id.
            WrongStateError: it has ended.
        """
        return await self._change("cancel", job_id, actor, lambda: self.catalogue.cancel(job_id, actor))

    async def retry(self, job_id: str, actor: Actor) -> Job:
        """A new job, of a new generation, with the request of one that failed or was cancelled.

        Raises:
            RecordNotFoundError: there is none of that id.
            WrongStateError: it has not ended, or has succeeded.
        """
        return await self._change(
            "retry", job_id, actor, lambda: self.catalogue.retry(job_id, actor, limit=self._limit)
        )

    async def _look(self, job_id: str) -> Job:
        with translated():
            return await self._calls(lambda: self.catalogue.job(job_id))
