"""`/admin/audit`: who changed what, when, from where, with what result."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import Field

from service.api.admin.asking import AdminParts, Page, admin_refusals
from service.api.admin.telling import audit_answer, json_answer, page
from service.api.wire.registry import AuditList


class _Entries(Page):
    before: Annotated[
        int | None, Field(ge=1, le=2**63 - 1, description="go on with entries older than this id")
    ] = None
    target: Annotated[
        str | None, Field(min_length=1, max_length=128, description="only those of this expert, job or alias")
    ] = None


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `GET /admin/audit` on `router`."""

    @router.get("/admin/audit", response_model=AuditList, responses=admin_refusals())
    async def audit(query: Annotated[_Entries, Query()]) -> Response:
        """List changes and refused changes, newest first."""
        found = await parts.registrar.audit(limit=query.limit + 1, before=query.before, target=query.target)
        shown, more = page(found, query.limit)
        return json_answer(AuditList(data=[audit_answer(entry) for entry in shown], has_more=more))
