"""`/admin/bundles`: which shared experts there are, and a new one over all current experts."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from service.api.admin.asking import AdminParts, Wait, actor_of, admin_refusals, scoped
from service.api.admin.experts import ACCEPTED, CHANGING, SUBMITTING
from service.api.admin.telling import accepted, bundle_answer, json_answer
from service.api.admin.waiting import ended_or_later
from service.api.bounds import at_most_items
from service.api.generation import while_connected
from service.api.wire.admin import BundleBody, IdempotencyKey, ReturnBody
from service.api.wire.registry import BundleAnswer, BundleList, JobAnswer
from service.errors import (
    ExpertRejectedError,
    RegistrationTimeoutError,
    RequestFailedError,
    StorageFullError,
)
from service.registrar import job_error

_BuildId = Annotated[str, Path(min_length=1, max_length=64)]


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/bundles` on `router`."""
    registrar, settings = parts.registrar, parts.settings

    @router.get("/admin/bundles", response_model=BundleList, responses=admin_refusals())
    async def list_bundles() -> Response:
        """List the bundle that serves, then those that did: first the one that was replaced last."""
        return json_answer(BundleList(data=[bundle_answer(one) for one in await registrar.bundles()]))

    @router.post(
        "/admin/bundles",
        status_code=202,
        response_model=JobAnswer,
        responses={
            200: {"model": JobAnswer, "description": "With `wait`: built, and served by this replica."},
            **ACCEPTED,
            **admin_refusals(*SUBMITTING, ExpertRejectedError, RequestFailedError, RegistrationTimeoutError),
        },
    )
    async def rebuild(
        request: Request, body: BundleBody, query: Annotated[Wait, Query()], key: IdempotencyKey = None
    ) -> Response:
        """Build a shared expert over all current experts beside the one that serves, then switch to it."""
        for name, prompts in (body.prompts or {}).items():
            at_most_items(
                len(prompts), settings.max_profile_prompts, f"prompts.{name}", "max_profile_prompts"
            )
        job = await registrar.rebuild(body.asked(), actor_of(request), scoped(request, key))
        job = await while_connected(request, ended_or_later(job, query.wait, parts))
        if not query.wait or job.ended is None:
            return accepted(job)
        if job.state != "succeeded":
            raise job_error(job)
        response = accepted(job)
        response.status_code = 200
        return response

    @router.post(
        "/admin/bundles/{build_id}/activate",
        response_model=BundleAnswer,
        responses=admin_refusals(*CHANGING, StorageFullError),
    )
    async def activate(request: Request, build_id: _BuildId, body: ReturnBody | None = None) -> Response:
        """Serve a bundle again that another one replaced, with the generations that served with it.

        The answer comes once this replica serves it, or after 10 s: `GET /admin/registry` tells what it serves.
        """
        retire = body is not None and body.absent == "retire"
        bundle = await registrar.return_to(build_id, actor_of(request), retire_absent=retire)
        return json_answer(bundle_answer(bundle))
