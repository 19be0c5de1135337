"""`/admin/registry`: revisions, replicas, what is broken; garbage collection."""

from fastapi import APIRouter, Request, Response

from service.api.admin.asking import AdminParts, actor_of, admin_refusals
from service.api.admin.telling import json_answer, registry_answer
from service.api.wire.admin import CollectBody
from service.api.wire.registry import CollectedAnswer, RegistryAnswer
from service.errors import StorageFullError


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/registry` on `router`."""
    registrar = parts.registrar

    @router.get("/admin/registry", response_model=RegistryAnswer, responses=admin_refusals())
    async def look() -> Response:
        """Tell the catalogue's revision, the one that this replica serves, and how the other replicas are."""
        return json_answer(registry_answer(await registrar.state()))

    @router.post(
        "/admin/registry/gc", response_model=CollectedAnswer, responses=admin_refusals(StorageFullError)
    )
    async def collect(request: Request, body: CollectBody | None = None) -> Response:
        """Give up files that no generation, lease or replica needs."""
        collected = await registrar.collect_garbage(actor_of(request), body.keep if body else None)
        return json_answer(
            CollectedAnswer(
                generations=list(collected.generations), blobs=collected.blobs, bytes=collected.nbytes
            )
        )
