"""`/admin/experts`: list, register, retire. The work is the registrar's."""

from fastapi import APIRouter, Response

from service.api.bounds import at_most_items
from service.api.refusals import refusals
from service.api.wire.admin import RegisterBody
from service.api.wire.answers import ExpertAnswer, ExpertList, RegisteredAnswer
from service.core import ExpertStatus
from service.errors import (
    ConflictError,
    EngineDeadError,
    ExpertNotFoundError,
    ExpertRejectedError,
    FolderNotFoundError,
    PathNotAllowedError,
    QueueFullError,
    RegistrationTimeoutError,
)
from service.registrar import Registrar, Registration
from service.settings import Settings


def _fields(status: ExpertStatus) -> dict[str, str | int | bool]:
    return {
        "name": status.name,
        "generation": status.generation,
        "state": status.state,
        "routed": status.routed,
        "leases": status.leases,
        "bytes": status.nbytes,
        "max_rank": status.max_rank,
        "resident": status.resident,
    }


def add_routes(router: APIRouter, registrar: Registrar, settings: Settings) -> None:
    """Put `/admin/experts` on `router`."""

    @router.get("/admin/experts", response_model=ExpertList)
    async def list_experts() -> Response:
        """List every generation in memory, retired ones that still serve included."""
        listed = ExpertList(data=[ExpertAnswer.model_validate(_fields(one)) for one in registrar.list()])
        return Response(listed.dump(), media_type="application/json")

    @router.get("/admin/experts/{name}", response_model=ExpertAnswer, responses=refusals(ExpertNotFoundError))
    async def get_expert(name: str) -> Response:
        """Describe the current generation of one expert."""
        answer = ExpertAnswer.model_validate(_fields(registrar.get(name)))
        return Response(answer.dump(), media_type="application/json")

    @router.post(
        "/admin/experts",
        status_code=201,
        response_model=RegisteredAnswer,
        responses=refusals(
            ConflictError,
            PathNotAllowedError,
            ExpertRejectedError,
            FolderNotFoundError,
            QueueFullError,
            RegistrationTimeoutError,
            EngineDeadError,
        ),
    )
    async def register(body: RegisterBody) -> Response:
        """Make an expert of a folder on the server and serve it, while requests run."""
        at_most_items(len(body.prompts), settings.max_profile_prompts, "prompts", "max_profile_prompts")
        registered = await registrar.register(
            Registration(
                name=body.name,
                path=body.path,
                size=body.size(),
                prompts=tuple(body.prompts),
                expected_generation=body.expected_generation,
                replace=body.replace,
            )
        )
        answer = RegisteredAnswer.model_validate(
            {**_fields(registered.status), "report": dict(registered.report)}
        )
        return Response(answer.dump(), status_code=201, media_type="application/json")

    @router.delete(
        "/admin/experts/{name}",
        response_model=ExpertAnswer,
        responses=refusals(ExpertNotFoundError, QueueFullError, EngineDeadError),
    )
    async def retire(name: str) -> Response:
        """Serve an expert no more; running requests keep it until they end."""
        answer = ExpertAnswer.model_validate(_fields(await registrar.retire(name)))
        return Response(answer.dump(), media_type="application/json")
