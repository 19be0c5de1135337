"""`/admin/jobs`: look at jobs, follow one, cancel it, try it again."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field

from experts.registry.records import JobState
from service.api.admin.asking import AdminParts, Page, actor_of, admin_refusals
from service.api.admin.experts import ACCEPTED
from service.api.admin.telling import accepted, job_answer, json_answer, page, retry_after
from service.api.admin.waiting import events_of
from service.api.generation import begun
from service.api.refusals import Responses
from service.api.sse import EventStream
from service.api.wire.registry import JobAnswer, JobList
from service.errors import QueueFullError, RecordNotFoundError, StorageFullError, WrongStateError

_EVENTS: Responses = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {"description": "Server-sent events."},
                "example": 'event: progress\nid: 9b1c\ndata: {"state": "running", "percent": 42.5, …}\n\n',
            }
        }
    }
}


class _Jobs(Page):
    state: Annotated[JobState | None, Field(description="only those")] = None
    name: Annotated[str | None, Field(max_length=64, description="only those of this expert")] = None
    after: Annotated[
        str | None, Field(min_length=1, max_length=64, description="go on behind this job, with older ones")
    ] = None


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/jobs` on `router`."""
    registrar = parts.registrar

    @router.get("/admin/jobs", response_model=JobList, responses=admin_refusals(RecordNotFoundError))
    async def list_jobs(query: Annotated[_Jobs, Query()]) -> Response:
        """List jobs, newest first."""
        found = await registrar.jobs(
            state=query.state, name=query.name, limit=query.limit + 1, after=query.after
        )
        shown, more = page(found, query.limit)
        return json_answer(JobList(data=[job_answer(job) for job in shown], has_more=more))

    @router.get("/admin/jobs/{job}", response_model=JobAnswer, responses=admin_refusals(RecordNotFoundError))
    async def get_job(job: str) -> Response:
        """Describe one job: its state, how far it is, what came of it."""
        found = await registrar.job(job)
        return json_answer(job_answer(found), headers=retry_after(found))

    @router.get(
        "/admin/jobs/{job}/events",
        response_class=Response,
        responses={**_EVENTS, **admin_refusals(RecordNotFoundError)},
    )
    async def follow(
        request: Request,
        job: str,
        last: Annotated[str | None, Header(alias="Last-Event-ID", max_length=64)] = None,
    ) -> Response:
        """Follow one job: `progress` whenever it has changed, from how it is now, and `end` as the last event."""
        found = await registrar.job(job)
        keepalive = parts.settings.keepalive_seconds
        events = await begun(request, events_of(registrar.watch(found.id), last, parts), keepalive)
        return EventStream(events, lambda: None, keepalive, done=b"", framed=True)

    @router.post(
        "/admin/jobs/{job}/cancel",
        response_model=JobAnswer,
        responses=admin_refusals(RecordNotFoundError, WrongStateError, StorageFullError),
    )
    async def cancel(request: Request, job: str) -> Response:
        """Cancel a job: a waiting one at once, a running one at its next chance; nothing of it stays."""
        found = await registrar.cancel(job, actor_of(request))
        return json_answer(job_answer(found), headers=retry_after(found))

    @router.post(
        "/admin/jobs/{job}/retry",
        status_code=202,
        response_model=JobAnswer,
        responses={
            **ACCEPTED,
            **admin_refusals(RecordNotFoundError, WrongStateError, QueueFullError, StorageFullError),
        },
    )
    async def retry(request: Request, job: str) -> Response:
        """Begin a failed or cancelled job anew, as a new job with a new generation."""
        return accepted(await registrar.retry(job, actor_of(request)))
