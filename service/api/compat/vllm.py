"""vLLM's runtime LoRA updates: an adapter is an expert, loading registers it and unloading retires it.

As there: the fields, the sentence of success as plain text, 400 for a name that is taken and 404 for a missing folder
or adapter; the answer comes when the adapter serves. Different:

- They need the admin key, and `lora_path` must lie below TWINSERVE_EXPERTS_ROOT, as in `POST /admin/experts`.
- A full fine-tune loads as well as a LoRA, and either is compressed against this bundle's shared expert.
- A checkpoint that cannot become an expert is 422 with the reason, not 500.
- What is loaded stays, here and on all other replicas, until it is unloaded. Loading is a job: a client that hangs up
  leaves it running, `GET /admin/jobs` shows it.
- `load_inplace` publishes a new generation; running requests keep the one that they began with.
- The router knows such an expert by its weights at most, where it can tell experts by them: register it with
  `prompts` through `POST /admin/experts` for more.
"""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from experts.registry.records import ENDED, Job
from service.api.admin import AdminParts
from service.api.admin.asking import actor_of
from service.api.admin.telling import job_path
from service.api.admin.waiting import ended_or_later
from service.api.compat.errors import in_words
from service.api.compat.wire.vllm import LoadBody, UnloadBody
from service.api.generation import while_connected
from service.api.refusals import refusals
from service.errors import (
    AdminDisabledError,
    ConflictError,
    EngineDeadError,
    ExpertNotFoundError,
    ExpertRejectedError,
    FolderNotFoundError,
    InvalidRequestError,
    PathNotAllowedError,
    QueueFullError,
    RegistrationTimeoutError,
    RegistryUnavailableError,
    RequestFailedError,
    ShuttingDownError,
    SignatureRejectedError,
    StorageFullError,
    TwinserveError,
    WrongStateError,
)
from service.registrar import ChangeAsked, Registration, job_error

_NAMES = {"name": "lora_name", "path": "lora_path"}

_SLACK_SECONDS = 60.0
"""On top of what a registration may take: what the jobs before it may."""

_REFUSALS = refusals(
    AdminDisabledError,
    PathNotAllowedError,
    ExpertNotFoundError,
    ExpertRejectedError,
    SignatureRejectedError,
    WrongStateError,
    QueueFullError,
    RequestFailedError,
    EngineDeadError,
    RegistrationTimeoutError,
    RegistryUnavailableError,
    StorageFullError,
)


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter` on `router`."""
    registrar = parts.registrar

    async def loaded(request: Request, body: LoadBody) -> None:
        asked = Registration(name=body.lora_name, path=body.lora_path, replace=body.load_inplace)
        job = await registrar.submit(asked, actor_of(request))
        wait = parts.settings.registration_seconds + _SLACK_SECONDS
        job = await while_connected(request, ended_or_later(job, wait, parts))
        if job.state not in ENDED:
            raise _not_yet(job, parts)
        if job.state != "succeeded":
            raise job_error(job)

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=_REFUSALS)
    async def load_lora_adapter(request: Request, body: LoadBody) -> Response:
        """Register a folder on the server as an expert. Needs the admin key."""
        try:
            with in_words(_NAMES):
                await loaded(request, body)
        except ConflictError as error:
            raise InvalidRequestError(
                f"The lora adapter {body.lora_name!r} has already been loaded; to replace it send "
                '"load_inplace": true.'
                if error.param
                else error.message,
                param=error.param,
            ) from error
        except FolderNotFoundError as error:
            raise _not_found(error) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=_REFUSALS)
    async def unload_lora_adapter(request: Request, body: UnloadBody) -> Response:
        """Retire an expert; running requests keep it until they end. Needs the admin key."""
        try:
            await registrar.retire(body.lora_name, asked=ChangeAsked(actor_of(request)))
        except ExpertNotFoundError as error:
            raise ExpertNotFoundError(
                f"The lora adapter {body.lora_name[:64]!r} cannot be found.", param="lora_name"
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _not_found(error: TwinserveError) -> TwinserveError:
    """404, as vLLM answers."""
    return ExpertNotFoundError(error.message, param=error.param)


def _not_yet(job: Job, parts: AdminParts) -> TwinserveError:
    """The job goes on, and its client does not wait any longer."""
    told = f"The job goes on: GET {job_path(job)} shows it."
    if parts.draining:
        return ShuttingDownError(f"The server is shutting down. {told}", retry_after=5)
    return RegistrationTimeoutError(f"The adapter is not loaded yet. {told}")
