"""LoRAX's own routes, which are TGI's with adapters: `/generate`, `/generate_stream`, `/` for its clients, `/info`.

As there: fields, answers and streams, 422 `validation`, 429 `overloaded` and 424 `generation`, greedy without a
sampling parameter, the stop sequence at the end of the text. Different:

- Without `adapter_id` and `merged_adapters` the router chooses; `"adapter_id": "__base_model__"` is the shared expert
  alone. `routing` is added to every answer and to a stream's last event.
- Adapters are experts that were registered; nothing is fetched, so `adapter_source` can only be "local".
- `merged_adapters` are added exactly, each expert's product times its weight, in the same batch as everything else.
  LoRAX merges the factors A and B separately, which is another model. Only `linear` is a sum: others are refused.
- `seed` is that of the answer also where none was sent: with it the same request gives the same answer.
- Log-probabilities are those of the model's own distribution, before penalties and temperature.
- Unknown fields are refused; `watermark` and `typical_p` are accepted where they ask for nothing.
"""

import json
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from service.api.bounds import kept_tokens
from service.api.compat.errors import documented, in_words, lorax_shape, shaped
from service.api.compat.lorax_answers import Answering
from service.api.compat.running import CompatBody, Telling, respond
from service.api.compat.wire.lorax import (
    EitherBody,
    GenerateAnswer,
    GenerateBody,
    GenerateStreamBody,
    Info,
    LoraxError,
    Parameters,
)
from service.api.health import server_version
from service.api.naming import SHARED, check_weight
from service.api.parts import Parts
from service.api.plan import Budget, check, make_plan
from service.core import Constraint
from service.errors import TwinserveError, UnknownExpertError

BASE_MODEL = "__base_model__"
"""LoRAX's name for no adapter at all."""

_NAMES = {
    "likeliest": "parameters.return_k_alternatives",
    "max_tokens": "parameters.max_new_tokens",
    "model": "parameters.adapter_id",
    "n": "parameters.best_of",
    "prompt": "inputs",
    "stop": "parameters.stop",
    "timeout": "parameters.timeout",
    "truncate_prompt_tokens": "parameters.truncate",
}


def add_routes(router: APIRouter, parts: Parts, base: type[APIRoute]) -> None:
    """Put `/generate`, `/generate_stream`, `POST /` and `/info` on `router`.

    Args:
        base: the class of routes elsewhere.
    """
    route: dict[str, Any] = {"route_class_override": shaped(base, lorax_shape)}
    told = documented(
        LoraxError, {400: 422, 500: 424}, '{"token": {…}, "generated_text": "…", "details": {…}}'
    )
    refused = {status: one for status, one in told.items() if status != 200}

    async def answered(
        request: Request, inputs: str, parameters: Parameters, *, stream: bool, listed: bool = False
    ) -> Response:
        wanted = _in_our_words(parameters, await _gates(parameters, parts), stream, parts)
        budget = Budget(parameters.max_new_tokens, "parameters.max_new_tokens", parts.settings.max_tokens)
        with in_words(_NAMES):
            routing = await check(wanted, 1, budget, parts.backend, parts.settings, parts.naming)
            keep = kept_tokens(wanted, budget.asked, parts.backend, parts.settings)
            prompts = await parts.encoder.prompts([inputs], "inputs", keep=keep)
            plan = make_plan(
                wanted,
                routing,
                budget,
                prompts,
                parts.backend,
                parts.settings,
                constraint=_constraint(parameters),
            )
        answering = Answering(inputs, parameters, wanted.seed, plan, parts.texts, listed=listed)
        telling = Telling("lorax", answering.whole, answering.chunks, _failure)
        return await respond(request, wanted, plan, telling, parts)

    async def generate(request: Request, body: GenerateBody) -> Response:
        """Continue a text with an expert, with a mix of experts, or with whatever the router chooses."""
        return await answered(request, body.inputs, body.parameters, stream=False)

    async def generate_stream(request: Request, body: GenerateStreamBody) -> Response:
        """The same, an event a token."""
        return await answered(request, body.inputs, body.parameters, stream=True)

    async def either(request: Request, body: EitherBody) -> Response:
        """What the Python clients of LoRAX and TGI call: `stream` chooses; without it a list of one answer."""
        return await answered(request, body.inputs, body.parameters, stream=body.stream, listed=True)

    post: dict[str, Any] = {"methods": ["POST"], **route}
    router.add_api_route("/generate", generate, response_model=GenerateAnswer, responses=refused, **post)
    router.add_api_route("/generate_stream", generate_stream, response_class=Response, responses=told, **post)
    router.add_api_route("/", either, response_model=list[GenerateAnswer], responses=told, **post)

    async def info() -> Response:
        """Tell what is served, and its limits."""
        settings, backend = parts.settings, parts.backend
        told = Info(
            model_id=backend.bundle_name,
            max_concurrent_requests=settings.max_batch + settings.max_queue,
            max_best_of=settings.max_n,
            max_stop_sequences=settings.max_stop,
            max_input_length=min(settings.max_prompt_tokens or backend.max_context, backend.max_context - 1),
            max_total_tokens=backend.max_context,
            version=server_version(),
        )
        return Response(told.dump(), media_type="application/json")

    router.add_api_route("/info", info, methods=["GET"], response_model=Info, **route)


def _failure(error: TwinserveError) -> dict[str, Any]:
    return lorax_shape(error, error.status)[1]


def _in_our_words(
    parameters: Parameters, gates: dict[str, float] | None, stream: bool, parts: Parts
) -> CompatBody:
    told = stream or parameters.details or parameters.decoder_input_details or (parameters.best_of or 1) > 1
    seed = parameters.seed
    if parameters.sampled and seed is None:
        seed = secrets.randbits(63)
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    with in_words(_NAMES):
        return CompatBody.model_validate(
            {
                "model": {None: parts.backend.bundle_name, BASE_MODEL: SHARED}.get(
                    parameters.adapter_id, parameters.adapter_id
                ),
                "gates": gates,
                "routing": parameters.routing,
                "n": parameters.best_of or 1,
                "stream": stream,
                "temperature": temperature if parameters.sampled else 0.0,
                "top_k": parameters.top_k or 0,
                "top_p": parameters.top_p or 1.0,
                "repetition_penalty": parameters.repetition_penalty,
                "frequency_penalty": parameters.frequency_penalty,
                "presence_penalty": parameters.presence_penalty,
                # The same 64 bits, as the signed integer that our own field is.
                "seed": seed if seed is None or seed < 2**63 else seed - 2**64,
                "stop": parameters.stop,
                "include_stop_str_in_output": True,
                "ignore_eos": parameters.ignore_eos_token,
                "truncate_prompt_tokens": parameters.truncate,
                "timeout": parameters.timeout,
                "likeliest": (parameters.return_k_alternatives or 0) if told else None,
                "likeliest_of_prompt": 0 if parameters.decoder_input_details else None,
            }
        )


def _constraint(parameters: Parameters) -> Constraint | None:
    schema = parameters.response_format
    if schema is None:
        return None
    return Constraint("json_schema", json.dumps(schema), "parameters.response_format")


async def _gates(parameters: Parameters, parts: Parts) -> dict[str, float] | None:
    merged = parameters.merged_adapters
    if merged is None:
        return None
    places = {name: f"parameters.merged_adapters.ids[{index}]" for index, name in enumerate(merged.ids)}
    try:
        await parts.naming.experts(places)
    except UnknownExpertError as error:
        raise UnknownExpertError(
            f"{error.param}: {error.message} GET /v1/models lists the names.", param=error.param
        ) from error
    for index in range(len(merged.ids)):
        weight = f"parameters.merged_adapters.weights[{index}]"
        check_weight(weight, merged.weights[index], parts.settings.max_gate)
    return dict(zip(merged.ids, merged.weights, strict=True))
