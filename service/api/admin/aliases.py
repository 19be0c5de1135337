"""`/admin/aliases`: other names of experts."""

from fastapi import APIRouter, Request, Response

from service.api.admin.asking import AdminParts, actor_of, admin_refusals
from service.api.admin.telling import json_answer
from service.api.wire.admin import AliasBody
from service.api.wire.registry import AliasAnswer, AliasList, DeletedAnswer
from service.errors import (
    ConflictError,
    ExpertNotFoundError,
    RecordNotFoundError,
    StorageFullError,
    WrongStateError,
)


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/aliases` on `router`."""
    registrar = parts.registrar

    @router.get("/admin/aliases", response_model=AliasList, responses=admin_refusals())
    async def list_aliases() -> Response:
        """List every alias with the expert that it stands for."""
        known = sorted((await registrar.aliases()).items())
        return json_answer(AliasList(data=[AliasAnswer(alias=alias, expert=name) for alias, name in known]))

    @router.get(
        "/admin/aliases/{alias}", response_model=AliasAnswer, responses=admin_refusals(RecordNotFoundError)
    )
    async def get_alias(alias: str) -> Response:
        """Tell what one alias stands for."""
        name = (await registrar.aliases()).get(alias)
        if name is None:
            raise RecordNotFoundError(
                f"There is no alias {alias[:64]!r}; GET /admin/aliases lists them.", param="alias"
            )
        return json_answer(AliasAnswer(alias=alias, expert=name))

    @router.put(
        "/admin/aliases/{alias}",
        response_model=AliasAnswer,
        responses=admin_refusals(ExpertNotFoundError, ConflictError, WrongStateError, StorageFullError),
    )
    async def set_alias(request: Request, alias: str, body: AliasBody) -> Response:
        """Let an alias stand for an expert from now on; all requests that name it follow at once."""
        await registrar.set_alias(alias, body.expert, actor_of(request))
        return json_answer(AliasAnswer(alias=alias, expert=body.expert))

    @router.delete(
        "/admin/aliases/{alias}",
        response_model=DeletedAnswer,
        responses=admin_refusals(RecordNotFoundError, StorageFullError),
    )
    async def remove_alias(request: Request, alias: str) -> Response:
        """Take an alias away; the expert stays."""
        await registrar.remove_alias(alias, actor_of(request))
        return json_answer(DeletedAnswer(id=alias))
