"""llama.cpp's server: adapters by number with scales, and its own completion endpoint.

As there: fields and their defaults, one JSON object a finished choice, streams whose last event has `stop: true` and
that end without `[DONE]`, errors with a numeric `code`. Different:

- A scale is the weight of an expert's exclusive vector over the shared expert: it may be negative, and requests with
  different scales share a batch. Ids are numbers of this process (see `AdapterIds`); names stay, so prefer `gates`.
- Without scales the router chooses, from the start. `POST /lora-adapters` sets scales for requests to `/completion`
  that name none, replaced as a whole; `DELETE /lora-adapters` gives those requests back to the router. `/v1` is never
  changed by it, since its requests say by `model` who answers. Both need the admin key, and neither outlives the
  process or reaches another one.
- A retired expert in the default scales is an error of the requests that need it, not a silent fallback.
- Temperature is applied before `min_p`, `top_k` and `top_p`, in that order (llama.cpp: after them), and penalties
  count all tokens: the repetition penalty prompt and answer, the other two the answer.
- Probabilities are those of the model's own distribution. A bias is limited to ±100; `false` bans.
- Samplers and options that this server has not are accepted at values that ask for nothing. There are no slots.
- `timings` are as the client waited, with queue and router in `prompt_ms`.
- Nothing is ever cut or shifted: a prompt that does not fit is refused.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from service.api.compat.adapters import DefaultMix
from service.api.compat.errors import documented, in_words, llamacpp_shape, refused, shaped
from service.api.compat.llamacpp_answers import Answering, settings_of
from service.api.compat.running import CompatBody, Telling, respond
from service.api.compat.wire.llamacpp import (
    RANDOM_SEEDS,
    Adapter,
    LlamaAnswer,
    LlamaBody,
    LlamaError,
    Part,
)
from service.api.health import server_version
from service.api.parts import Parts
from service.api.plan import Budget, check, make_plan
from service.api.refusals import merged, refusals, with_body
from service.api.wire.lora import Lora
from service.core import Constraint, ConstraintKind
from service.errors import AdminDisabledError, InvalidRequestError, TwinserveError, UnsupportedFieldError

_NAMES = {
    "gates": "lora",
    "likeliest": "n_probs",
    "max_tokens": "n_predict",
    "n": "n_cmpl",
    "repetition_penalty": "repeat_penalty",
}


def add_routes(router: APIRouter, parts: Parts, base: type[APIRoute]) -> None:
    """Put `/completion`, `/completions`, `/lora-adapters` and `/props` on `router`.

    Args:
        base: the class of routes elsewhere.
    """
    mix = DefaultMix()
    route: dict[str, Any] = {"route_class_override": shaped(base, llamacpp_shape)}
    generating = documented(LlamaError, {}, '{"index": 0, "content": "", "stop": true, …}')

    async def complete(request: Request, body: LlamaBody) -> Response:
        """Continue one or more prompts; several choices come as a list."""
        gates = _gates(body, parts, mix)
        wanted = _in_our_words(body, gates, parts)
        budget = Budget(
            None if body.n_predict == -1 else body.n_predict, "n_predict", parts.settings.max_tokens
        )
        with in_words(_NAMES if body.gates is None else {**_NAMES, "gates": "gates"}):
            routing = await check(
                wanted, len(body.prompt), budget, parts.backend, parts.settings, parts.naming
            )
        bias, banned = await _biases(body, parts)
        prompts = await parts.encoder.prompts([await _joined(one, parts) for one in body.prompt])
        with in_words(_NAMES):
            wanted = wanted.model_copy(update={"logit_bias": bias})
            plan = make_plan(
                wanted, routing, budget, prompts, parts.backend, parts.settings, banned, _constraint(body)
            )
        answering = Answering(request.state.arrived, body, wanted, plan, parts)
        telling = Telling("llama", answering.whole, answering.chunks, _failure)
        return await respond(request, wanted, plan, telling, parts)

    for path in ("/completion", "/completions"):
        router.add_api_route(
            path,
            complete,
            methods=["POST"],
            response_model=LlamaAnswer | list[LlamaAnswer],
            responses=generating,
            **route,
        )

    async def list_adapters() -> Response:
        """List the experts by number, each with its scale in requests to `/completion` that name none."""
        scales = mix.gates or {}
        generations = {one.name: one.generation for one in parts.backend.experts() if one.state == "active"}
        listed = [
            Adapter(
                id=number,
                path=name,
                scale=scales.get(name, 0.0),
                generation=generations[name],
                chosen_by="router" if mix.gates is None else "scales",
            ).model_dump()
            for number, name in parts.ids.current().items()
            if name in generations
        ]
        return JSONResponse(listed)

    async def set_scales(scales: Annotated[Lora, Body(examples=[[{"id": 0, "scale": 0.5}]])]) -> Response:
        """Set the scales of requests to `/completion` that name none, others to 0. Needs the admin key."""
        mix.gates = parts.ids.gates(scales, parts.settings.max_gate, param="")
        return JSONResponse({"success": True})

    async def unset_scales() -> Response:
        """Extension: leave requests to `/completion` that name no scales to the router. Needs the admin key."""
        mix.gates = None
        return JSONResponse({"success": True})

    path = "/lora-adapters"
    router.add_api_route(path, list_adapters, methods=["GET"], response_model=list[Adapter], **route)
    writing: dict[str, Any] = {"response_model": dict[str, bool], **route}
    off = refused(LlamaError, refusals(AdminDisabledError))
    unset = refused(LlamaError, merged(refusals(AdminDisabledError), with_body()))
    router.add_api_route(path, set_scales, methods=["POST"], responses=unset, **writing)
    router.add_api_route(path, unset_scales, methods=["DELETE"], responses=off, **writing)

    async def props() -> Response:
        """Tell what is served and what a completion does that asks for nothing."""
        default = LlamaBody(prompt="-")  # type: ignore[arg-type]  # any: it is not shown
        told = {
            "default_generation_settings": {
                "n_ctx": parts.backend.max_context,
                "params": settings_of(default, _in_our_words(default, None, parts), parts),
            },
            "total_slots": parts.settings.max_batch,
            "model_alias": parts.backend.bundle_name,
            "model_path": parts.backend.bundle_name,
            "chat_template": parts.backend.tokenizer.chat_template or "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"twinserve-{server_version()}",
        }
        return JSONResponse(told)

    router.add_api_route("/props", props, methods=["GET"], response_model=dict[str, Any], **route)


def _failure(error: TwinserveError) -> dict[str, Any]:
    return llamacpp_shape(error, error.status)[1]


def _gates(body: LlamaBody, parts: Parts, mix: DefaultMix) -> dict[str, float] | None:
    """The request's own scales or gates; else the server's default ones, unless it says who answers."""
    if body.lora:
        return parts.ids.gates(body.lora, parts.settings.max_gate)
    if body.gates is not None or body.routing is not None:
        return body.gates
    if body.model not in (None, parts.backend.bundle_name):
        return None
    return mix.given(parts.backend.expert_names())


def _in_our_words(body: LlamaBody, gates: dict[str, float] | None, parts: Parts) -> CompatBody:
    """The body as ours, without its prompts and biases, which need the tokenizer."""
    if body.cache_prompt is False and parts.settings.prefix_cache:
        raise UnsupportedFieldError(
            "'cache_prompt' is true for all requests of this server (TWINSERVE_PREFIX_CACHE).",
            param="cache_prompt",
        )
    with in_words(_NAMES):
        return CompatBody.model_validate(
            {
                "model": body.model or parts.backend.bundle_name,
                "n": body.n_cmpl,
                "stream": body.stream,
                "temperature": body.temperature,
                "top_k": body.top_k,
                "top_p": body.top_p,
                "min_p": body.min_p,
                "repetition_penalty": body.repeat_penalty,
                "presence_penalty": body.presence_penalty,
                "frequency_penalty": body.frequency_penalty,
                # A seed that is drawn here can be told, and asked for again.
                "seed": secrets.randbelow(2**32 - 1) if body.seed in RANDOM_SEEDS else body.seed,
                "stop": list(body.stop),
                "ignore_eos": body.ignore_eos,
                "likeliest": body.n_probs or None,
                "timeout": body.timeout,
                "gates": gates,
                "routing": body.routing,
            }
        )


def _constraint(body: LlamaBody) -> Constraint | None:
    """What the answer must look like; an empty schema is any object, an empty grammar is none."""
    if body.json_schema is not None:
        kind: ConstraintKind = "json_schema" if body.json_schema else "json_object"
        return Constraint(kind, json.dumps(body.json_schema) if body.json_schema else "", "json_schema")
    return Constraint("grammar", body.grammar, "grammar") if body.grammar else None


async def _joined(parts: Sequence[Part], of: Parts) -> str | tuple[int, ...]:
    """A prompt of texts and ids → one text, or ids; only a text in front gets the tokenizer's own tokens."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    ids: list[int] = []
    for index, part in enumerate(parts):
        ids += (part,) if isinstance(part, int) else await of.encoder.tokens(part, special=index == 0)
    return tuple(ids)


async def _biases(body: LlamaBody, of: Parts) -> tuple[dict[int, float], tuple[tuple[int, ...], ...]]:
    """Token ids with their biases, and those that are banned, each as a word of its own."""
    biases: dict[int, float] = {}
    banned: dict[int, None] = {}
    for token, bias in body.logit_bias:
        for one in (token,) if isinstance(token, int) else await of.encoder.tokens(token, special=False):
            if one >= of.backend.vocab_size:
                raise InvalidRequestError(
                    f"logit_bias: {one} is outside the vocabulary (0 to {of.backend.vocab_size - 1}).",
                    param="logit_bias",
                )
            if bias is False:
                banned[one] = None
            else:
                biases[one] = bias
    return biases, tuple((one,) for one in banned)
