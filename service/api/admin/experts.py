"""`/admin/experts`: list, show, register, retire."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from experts.registry.records import Job
from service.api.admin.asking import (
    AdminParts,
    Expected,
    Page,
    Wait,
    actor_of,
    admin_refusals,
    expected,
    scoped,
)
from service.api.admin.telling import (
    accepted,
    etag,
    expert_fields,
    generation_answer,
    job_path,
    json_answer,
    page,
    serving,
)
from service.api.admin.waiting import ended_or_later
from service.api.bounds import at_most_items
from service.api.generation import while_connected
from service.api.refusals import Responses, merged
from service.api.wire.admin import IdempotencyKey, IfMatch, RegisterBody
from service.api.wire.registry import (
    ExpertAnswer,
    ExpertDetail,
    ExpertList,
    JobAnswer,
    RegisteredAnswer,
)
from service.errors import (
    ConflictError,
    EngineDeadError,
    ExpertNotFoundError,
    ExpertRejectedError,
    FolderNotFoundError,
    IdempotencyKeyError,
    PathNotAllowedError,
    PreconditionFailedError,
    QueueFullError,
    RecordNotFoundError,
    RegistrationTimeoutError,
    RequestFailedError,
    SignatureRejectedError,
    SourceNotAllowedError,
    StorageFullError,
    WrongStateError,
)
from service.registrar import Canary, ExpertView, Registration, TrialAsked, job_error

_SHOWN = 10
"""Generations that are told with an expert."""

LOCATION = {"Location": {"description": "Of what was made or begun.", "schema": {"type": "string"}}}
ETAG = {"ETag": {"description": "For `If-Match`.", "schema": {"type": "string"}}}
ACCEPTED: Responses = {202: {"description": "The job, under way.", "headers": LOCATION}}

SUBMITTING = (
    ConflictError,
    PreconditionFailedError,
    IdempotencyKeyError,
    WrongStateError,
    PathNotAllowedError,
    FolderNotFoundError,
    RecordNotFoundError,
    QueueFullError,
    EngineDeadError,
    StorageFullError,
)
"""What a job is refused for before it is queued."""

CHANGING = (
    ExpertNotFoundError,
    RecordNotFoundError,
    ConflictError,
    PreconditionFailedError,
    WrongStateError,
    EngineDeadError,
    StorageFullError,
)
"""What a change of an expert is refused for."""

_REGISTERING = merged(
    {},
    admin_refusals(
        *SUBMITTING,
        SourceNotAllowedError,
        SignatureRejectedError,
        ExpertRejectedError,
        RequestFailedError,
        RegistrationTimeoutError,
    ),
)


class _Listed(Page):
    limit: Annotated[int, Field(ge=1, le=1000, description="most items of the answer")] = 1000
    after: Annotated[str | None, Field(max_length=64, description="go on behind this name")] = None
    state: Annotated[
        Literal["active", "disabled", "retired"] | None,
        Field(description="only those; without it all but retired ones"),
    ] = None


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/experts` on `router`."""
    registrar, settings = parts.registrar, parts.settings

    @router.get("/admin/experts", response_model=ExpertList, responses=admin_refusals())
    async def list_experts(query: Annotated[_Listed, Query()]) -> Response:
        """List experts by name: the catalogue's word on each, and what this replica has of it."""
        views = sorted(await registrar.list(retired=query.state == "retired"), key=lambda view: view.name)
        chosen = [view for view in views if _asked_for(view, query)]
        shown, more = page(chosen, query.limit)
        listed = ExpertList(data=[ExpertAnswer(**expert_fields(view)) for view in shown], has_more=more)
        return json_answer(listed)

    @router.get(
        "/admin/experts/{name}",
        response_model=ExpertDetail,
        responses={200: {"headers": ETAG}, **admin_refusals(ExpertNotFoundError)},
    )
    async def get_expert(name: str) -> Response:
        """Describe one expert, with its newest generations."""
        view = await registrar.get(name)
        generations = await registrar.generations(name)
        answer = ExpertDetail(
            **expert_fields(view),
            aliases=sorted(alias for alias, target in (await registrar.aliases()).items() if target == name),
            generations=[generation_answer(one, serving(view)) for one in generations[:_SHOWN]],
        )
        return json_answer(answer, headers=etag(view.generation))

    @router.post(
        "/admin/experts",
        status_code=202,
        response_model=JobAnswer,
        responses={
            201: {
                "model": RegisteredAnswer,
                "description": "With `wait`: registered.",
                "headers": {**LOCATION, **ETAG},
            },
            **ACCEPTED,
            **_REGISTERING,
        },
    )
    async def register(
        request: Request,
        body: RegisterBody,
        query: Annotated[Wait, Query()],
        if_match: IfMatch = None,
        key: IdempotencyKey = None,
    ) -> Response:
        """Make an expert of a fine-tune, while requests run: begins a job, or with `wait` sees it through."""
        at_most_items(len(body.prompts), settings.max_profile_prompts, "prompts", "max_profile_prompts")
        known = expected(if_match, body.expected_generation)
        if known.existing and known.generation is None:
            await _must_exist(body.name, parts)
        job = await registrar.submit(_registration(body, known), actor_of(request), scoped(request, key))
        job = await while_connected(request, ended_or_later(job, query.wait, parts))
        if not query.wait or job.ended is None:
            return accepted(job)
        if job.state != "succeeded":
            raise job_error(job)
        return await _registered(job, parts)

    @router.delete(
        "/admin/experts/{name}",
        response_model=ExpertAnswer,
        responses=admin_refusals(*CHANGING),
    )
    async def retire(request: Request, name: str, if_match: IfMatch = None) -> Response:
        """Serve an expert no more; running requests keep it until they end."""
        view = await registrar.retire(name, asked=expected(if_match).of(request))
        return json_answer(ExpertAnswer(**expert_fields(view)))


def _asked_for(view: ExpertView, query: _Listed) -> bool:
    if query.after is not None and view.name <= query.after:
        return False
    return view.state != "retired" if query.state is None else view.state == query.state


def _registration(body: RegisterBody, known: Expected) -> Registration:
    trial = body.trial
    return Registration(
        name=body.name,
        path=body.path,
        upload=body.upload,
        url=body.url,
        size=body.size(),
        prompts=tuple(body.prompts),
        canaries=tuple(Canary(one.prompt, one.expected, one.match) for one in body.canary_prompts),
        canary_min_score=body.canary_min_score,
        expected_generation=known.generation,
        precondition=known.precondition,
        replace=body.replace or known.existing,
        activate=body.activate,
        trial=None if trial is None else TrialAsked(trial.kind, trial.percent),
        signature=body.signature,
    )


async def _must_exist(name: str, parts: AdminParts) -> None:
    """`If-Match: *` of an expert that is to be made.

    Raises:
        PreconditionFailedError: there is none of that name.
    """
    try:
        await parts.registrar.get(name)
    except ExpertNotFoundError as error:
        raise PreconditionFailedError(error.message, param="If-Match") from error


async def _registered(job: Job, parts: AdminParts) -> Response:
    """201: what a job has made."""
    name, number = job.name or "", job.generation or 0
    view = await parts.registrar.get(name)
    made = await parts.registrar.generation(name, number)
    answer = RegisteredAnswer(
        **expert_fields(view), job=job.id, new_generation=number, report=dict(made.report)
    )
    headers = {
        "Location": f"/admin/experts/{name}",
        "Content-Location": job_path(job),
        **etag(view.generation),
    }
    return json_answer(answer, 201, headers)
