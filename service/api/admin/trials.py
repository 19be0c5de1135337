"""`/admin/experts/{name}/trial`: a generation that is tried out on a part of the traffic."""

from fastapi import APIRouter, Request, Response

from service.api.admin.asking import AdminParts, actor_of, expected
from service.api.admin.generations import CHANGED, changed
from service.api.wire.admin import IfMatch, TrialBody
from service.api.wire.registry import ExpertAnswer


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `PUT` and `DELETE /admin/experts/{name}/trial` on `router`."""
    registrar = parts.registrar

    @router.put("/admin/experts/{name}/trial", response_model=ExpertAnswer, responses=CHANGED)
    async def try_out(request: Request, name: str, body: TrialBody, if_match: IfMatch = None) -> Response:
        """Try a ready generation out, as a canary or in the shadow; replaces the expert's trial."""
        asked = expected(if_match, body.expected_generation).of(request)
        return await changed(registrar.try_out(name, body.generation, body.kind, body.percent, asked=asked))

    @router.delete("/admin/experts/{name}/trial", response_model=ExpertAnswer, responses=CHANGED)
    async def end(request: Request, name: str) -> Response:
        """End the expert's trial; what served all along goes on."""
        return await changed(registrar.end_trial(name, actor=actor_of(request)))
