"""`/admin/experts/{name}/…`: generations, and which of them serves."""

import contextlib
from collections.abc import Awaitable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from service.api.admin.asking import AdminParts, Page, actor_of, admin_refusals, expected
from service.api.admin.experts import CHANGING, ETAG
from service.api.admin.telling import etag, expert_fields, generation_answer, json_answer, page, serving
from service.api.refusals import Responses
from service.api.wire.admin import ActivateBody, IfMatch, PinBody, RollbackBody
from service.api.wire.registry import ExpertAnswer, GenerationAnswer, GenerationList
from service.errors import ExpertNotFoundError, RecordNotFoundError
from service.registrar import ExpertView

CHANGED: Responses = {200: {"headers": ETAG}, **admin_refusals(*CHANGING)}

_Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


class _Generations(Page):
    before: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="go on with generations older than this one")
    ] = None


async def changed(change: Awaitable[ExpertView]) -> Response:
    """The expert after a change that this replica serves by now."""
    view = await change
    return json_answer(ExpertAnswer(**expert_fields(view)), headers=etag(view.generation))


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put generations, rollback, activate, pin, disable and enable on `router`."""
    registrar = parts.registrar

    @router.get(
        "/admin/experts/{name}/generations",
        response_model=GenerationList,
        responses=admin_refusals(ExpertNotFoundError),
    )
    async def list_generations(name: str, query: Annotated[_Generations, Query()]) -> Response:
        """List the generations of one expert, newest first; failed, collected and retired ones too."""
        generations = await registrar.generations(name)
        serving = await _serving(name)
        older = [one for one in generations if query.before is None or one.number < query.before]
        shown, more = page(older, query.limit)
        data = [generation_answer(one, serving) for one in shown]
        return json_answer(GenerationList(data=data, has_more=more))

    @router.get(
        "/admin/experts/{name}/generations/{generation}",
        response_model=GenerationAnswer,
        responses=admin_refusals(ExpertNotFoundError, RecordNotFoundError),
    )
    async def get_generation(name: str, generation: _Number) -> Response:
        """Describe one generation, with the report of its registration."""
        found = await registrar.generation(name, generation)
        return json_answer(generation_answer(found, await _serving(name)))

    async def _serving(name: str) -> int | None:
        with contextlib.suppress(ExpertNotFoundError):
            return serving(await registrar.get(name))
        return None

    @router.post("/admin/experts/{name}/rollback", response_model=ExpertAnswer, responses=CHANGED)
    async def rollback(
        request: Request, name: str, body: RollbackBody | None = None, if_match: IfMatch = None
    ) -> Response:
        """Serve an older generation again, at once; without a number the newest ready one before the current."""
        body = body or RollbackBody()
        asked = expected(if_match, body.expected_generation).of(request)
        return await changed(registrar.rollback(name, body.generation, asked=asked))

    @router.post("/admin/experts/{name}/activate", response_model=ExpertAnswer, responses=CHANGED)
    async def activate(request: Request, name: str, body: ActivateBody, if_match: IfMatch = None) -> Response:
        """Serve a ready generation, at once."""
        asked = expected(if_match, body.expected_generation).of(request)
        return await changed(registrar.activate(name, body.generation, asked=asked))

    @router.post("/admin/experts/{name}/pin", response_model=ExpertAnswer, responses=CHANGED)
    async def pin(
        request: Request, name: str, body: PinBody | None = None, if_match: IfMatch = None
    ) -> Response:
        """Keep a generation: registrations make new ones ready and leave this one in place."""
        body = body or PinBody()
        asked = expected(if_match, body.expected_generation).of(request)
        return await changed(registrar.pin(name, body.generation, asked=asked))

    @router.delete("/admin/experts/{name}/pin", response_model=ExpertAnswer, responses=CHANGED)
    async def unpin(request: Request, name: str) -> Response:
        """Let registrations put their generations live again."""
        return await changed(registrar.unpin(name, actor=actor_of(request)))

    @router.post("/admin/experts/{name}/disable", response_model=ExpertAnswer, responses=CHANGED)
    async def disable(request: Request, name: str, if_match: IfMatch = None) -> Response:
        """Take an expert out of service and keep its name and generations."""
        return await changed(registrar.disable(name, asked=expected(if_match).of(request)))

    @router.post("/admin/experts/{name}/enable", response_model=ExpertAnswer, responses=CHANGED)
    async def enable(request: Request, name: str, if_match: IfMatch = None) -> Response:
        """Serve a disabled expert again, at once."""
        return await changed(registrar.enable(name, asked=expected(if_match).of(request)))
