"""Waiting for a job, and letting go of who waits when the server drains."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

from experts.registry.records import ENDED, Job
from service.api.admin.asking import AdminParts
from service.api.admin.telling import job_answer

_LOOK_SECONDS = 0.5
"""How often a waiting request looks whether the server drains."""


async def ended_or_later(job: Job, wait: float, parts: AdminParts) -> Job:
    """The job once it has ended, or as it is after `wait` seconds or when the server drains.

    A client that hangs up meanwhile leaves the job alone.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait
    while job.state not in ENDED and not parts.draining and (left := deadline - clock()) > 0:
        job = await parts.registrar.wait(job.id, min(left, _LOOK_SECONDS))
    return job


async def events_of(jobs: AsyncIterator[Job], last: str | None, parts: AdminParts) -> AsyncIterator[bytes]:
    """A job as server-sent events: `progress` whenever it changed, then `end` once.

    An event's id is made of what it says, so whoever comes back with `Last-Event-ID`, to this replica or another
    one, isn't told again what it knows. Stops without `end` when the server drains: clients come back by themselves.
    """
    iterator = aiter(jobs)
    following: asyncio.Task[Job] | None = None
    try:
        while not parts.draining:
            if following is None:
                following = asyncio.ensure_future(anext(iterator))
            await asyncio.wait({following}, timeout=_LOOK_SECONDS)
            if not following.done():
                continue
            try:
                job = following.result()
            except StopAsyncIteration:
                return
            following = None
            ended = job.state in ENDED
            data = job_answer(job).dump()
            identity = hashlib.sha256(data).hexdigest()[:16]
            if ended or identity != last:
                yield (
                    f"event: {'end' if ended else 'progress'}\nid: {identity}\ndata: ".encode()
                    + data
                    + b"\n\n"
                )
            last = identity
            if ended:
                return
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
