"""`/admin/experts/{name}/export` and `/admin/export`: experts for other programs, as tar archives."""

import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from experts.registry.records import Generation
from service.api.admin.asking import AdminParts, actor_of, admin_refusals
from service.api.generation import while_connected
from service.api.naming import check_weight
from service.api.refusals import Responses
from service.api.tar import TarStream
from service.errors import (
    ExpertNotFoundError,
    ExportRejectedError,
    InvalidRequestError,
    LimitExceededError,
    QueueFullError,
    RecordNotFoundError,
    StorageFullError,
    WrongStateError,
)
from service.registrar.exports import Export, Exporter
from service.registrar.opening import state_folder
from service.settings import Settings

_MAX_GATES = 64

_ARCHIVE: Responses = {
    200: {
        "description": "The archive, its files in one folder.",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_REFUSALS = admin_refusals(
    ExpertNotFoundError,
    RecordNotFoundError,
    WrongStateError,
    ExportRejectedError,
    LimitExceededError,
    QueueFullError,
    StorageFullError,
)


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Annotated[
        Literal["peft", "gguf", "expert"],
        Field(
            description="peft: a LoRA over the shared expert, exact; gguf: the same for llama.cpp; expert: the files "
            "as they are served, for a server of the same bundle"
        ),
    ]
    generation: Annotated[int | None, Field(ge=1, le=2**31 - 1, description="the current one by default")] = (
        None
    )


class _AskedModel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Annotated[Literal["model"], Field(description="a whole Hugging Face model")] = "model"
    gates: Annotated[
        str,
        Field(
            max_length=8192,
            description="experts and their gates, `a:0.5,b@3:0.5`; empty is the shared expert itself",
        ),
    ] = ""


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put the exports on `router`."""
    registrar, settings = parts.registrar, parts.settings
    exporter = Exporter(lambda: registrar.family, _root(settings))

    @router.get(
        "/admin/experts/{name}/export",
        response_class=Response,
        responses={**_ARCHIVE, **_REFUSALS},
    )
    async def export_expert(request: Request, name: str, query: Annotated[_Asked, Query()]) -> Response:
        """Send one generation of an expert in another program's form."""
        generation = await _generation(registrar.resolve(name), query.generation, parts)
        made = exporter.expert(query.format, generation)
        top = f"{generation.name}-{generation.number}-{query.format}"
        target = f"{generation.name}@{generation.number}"
        return await _sent(request, parts, made, top, target, {"format": query.format})

    @router.get("/admin/export", response_class=Response, responses={**_ARCHIVE, **_REFUSALS})
    async def export_model(request: Request, query: Annotated[_AskedModel, Query()]) -> Response:
        """Send the shared expert with gates merged in, as a whole model."""
        gates = read_gates(query.gates, settings.max_gate)
        gated = [
            (await _generation(registrar.resolve(name), number, parts, "gates"), gate)
            for (name, number), gate in gates.items()
        ]
        if len({generation.name for generation, _ in gated}) != len(gated):
            raise InvalidRequestError("gates names an expert twice; send one gate for it.", param="gates")
        top = f"{registrar.family.name}-model"
        detail = {"gates": {f"{generation.name}@{generation.number}": gate for generation, gate in gated}}
        return await _sent(request, parts, exporter.model(gated), top, "model", detail)


def read_gates(text: str, max_gate: float) -> dict[tuple[str, int | None], float]:
    """(Expert, its generation if one is named) → gate, of `a:0.5,b@3:0.5`.

    Raises:
        InvalidRequestError: it is not written so, or names an expert twice.
        LimitExceededError: too many gates, or one that is too large.
    """
    found: dict[tuple[str, int | None], float] = {}
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if len(items) > _MAX_GATES:
        raise LimitExceededError(
            f"gates names {len(items)} experts, the limit is {_MAX_GATES}.", param="gates"
        )
    for item in items:
        named, _, weight = item.rpartition(":")
        name, _, number = named.partition("@")
        try:
            gate = float(weight)
        except ValueError:
            gate = math.nan
        if not name or not math.isfinite(gate) or ("@" in named and not _is_number(number)):
            raise InvalidRequestError(
                f"gates has {item[:80]!r}; write EXPERT:GATE or EXPERT@GENERATION:GATE, separated by commas.",
                param="gates",
            )
        check_weight("gates", gate, max_gate)
        key = (name, int(number) if number else None)
        if key in found:
            raise InvalidRequestError(
                f"gates names {named[:80]!r} twice; send one gate for it.", param="gates"
            )
        found[key] = gate
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) <= 9


async def _generation(
    name: str, number: int | None, parts: AdminParts, param: str | None = None
) -> Generation:
    """What a request means: the current generation if it names none.

    Raises:
        ExpertNotFoundError, RecordNotFoundError: there is no such expert or generation.
        WrongStateError: none is ready yet.
    """
    if number is None:
        try:
            expert, _ = await parts.registrar.expert(name)
        except ExpertNotFoundError as error:
            raise ExpertNotFoundError(error.message, param=param) from error
        number = expert.generation
    if number is None:
        raise WrongStateError(f"The expert {name[:64]!r} has no ready generation yet.", param=param)
    return await parts.registrar.generation(name, number)


async def _sent(
    request: Request,
    parts: AdminParts,
    making: AbstractAsyncContextManager[Export],
    top: str,
    target: str,
    detail: Mapping[str, Any],
) -> Response:
    """The archive, once it is made; what was made is removed when it has been sent, or nobody waits for it."""
    async with AsyncExitStack() as held:
        made = await while_connected(request, held.enter_async_context(making))
        await parts.registrar.exported(actor_of(request), target, detail)
        return TarStream(made.folder, made.files, top, held.pop_all().aclose)
    raise AssertionError("an exit stack suppresses nothing")


def _root(settings: Settings) -> Path:
    """The state folder, or the machine's own for temporary files where that cannot be written."""
    state = state_folder(settings)
    return (state if os.access(state, os.W_OK) else Path(tempfile.gettempdir())) / "twinserve-exports"
