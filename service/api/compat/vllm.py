"""vLLM's runtime LoRA updates: an adapter is an expert, loading registers it and unloading retires it.

As there: the fields, the sentence of success as plain text, 400 for a name that is taken and 404 for a missing folder
or adapter. Different:

- They need the admin key, and `lora_path` must lie below TWINSERVE_EXPERTS_ROOT, as in `POST /admin/experts`.
- A full fine-tune loads as well as a LoRA, and either is compressed against this bundle's shared expert.
- A checkpoint that cannot become an expert is 422 with the reason, not 500.
- What is loaded stays in the bundle when the server starts again, until it is unloaded.
- `load_inplace` publishes a new generation; running requests keep the one that they began with.
- The router does not choose such an expert: register it with `prompts` through `POST /admin/experts` for that.
"""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from service.api.compat.errors import in_words
from service.api.compat.wire.vllm import LoadBody, UnloadBody
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
    RequestFailedError,
    TwinserveError,
)
from service.registrar import Registrar, Registration

_NAMES = {"name": "lora_name", "path": "lora_path"}


_REFUSALS = refusals(
    AdminDisabledError,
    PathNotAllowedError,
    ExpertNotFoundError,
    ExpertRejectedError,
    QueueFullError,
    RequestFailedError,
    EngineDeadError,
    RegistrationTimeoutError,
)


def add_routes(router: APIRouter, registrar: Registrar) -> None:
    """Put `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter` on `router`."""

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=_REFUSALS)
    async def load_lora_adapter(body: LoadBody) -> Response:
        """Register a folder on the server as an expert. Needs the admin key."""
        asked = Registration(name=body.lora_name, path=body.lora_path, replace=body.load_inplace)
        try:
            with in_words(_NAMES):
                await registrar.register(asked)
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
    async def unload_lora_adapter(body: UnloadBody) -> Response:
        """Retire an expert; running requests keep it until they end. Needs the admin key."""
        try:
            await registrar.retire(body.lora_name)
        except ExpertNotFoundError as error:
            raise ExpertNotFoundError(
                f"The lora adapter {body.lora_name[:64]!r} cannot be found.", param="lora_name"
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _not_found(error: TwinserveError) -> TwinserveError:
    """404, as vLLM answers."""
    return ExpertNotFoundError(error.message, param=error.param)
