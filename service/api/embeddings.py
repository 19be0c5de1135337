"""`/v1/embeddings`: pooled final states, of the shared expert or of any mix, in the same steps as everything else."""

import asyncio
import base64
import time
from collections.abc import Iterator, Sequence

import numpy as np
from fastapi import APIRouter, Request, Response

from service.api.backend import Backend
from service.api.bounds import at_most, kept_end
from service.api.generate import answered_id
from service.api.generation import Batch, while_connected
from service.api.headers import routing_headers
from service.api.naming import Naming, named_by
from service.api.prompts import PromptEncoder
from service.api.refusals import ANSWERED, GENERATING, Responses
from service.api.wire.answers import RoutingAnswer
from service.api.wire.embeddings import EmbeddingAnswer, EmbeddingBody, EmbeddingItem
from service.core import Finished, GenerationRequest, RoutingChoice, SamplingParams
from service.errors import InvalidRequestError, RequestFailedError
from service.settings import Settings

_ANSWERS: Responses = {200: {"headers": ANSWERED[200]["headers"]}, **GENERATING}

_INLINE_VALUES = 2**16
"""More are written off the event loop."""

_NOTHING = SamplingParams(max_tokens=1)
"""No token is generated."""


def add_routes(
    router: APIRouter, backend: Backend, settings: Settings, encoder: PromptEncoder, naming: Naming
) -> None:
    """Put `POST /v1/embeddings` on `router`."""

    @router.post("/v1/embeddings", response_model=EmbeddingAnswer, responses=_ANSWERS)
    async def embed(request: Request, body: EmbeddingBody) -> Response:
        """Pool the model's final states over each input.

        `shared` reads without gates, an expert's name with that expert, the bundle's name with the gates that the
        router or the body gives.
        """
        routing = await naming.choose(body.model, body.gates, body.routing)
        _check(body, backend, settings)
        keep = kept_end(body.truncate_prompt_tokens, 1, backend, settings)
        inputs = await encoder.prompts(body.input, "input", special=body.add_special_tokens, keep=keep)
        answer_id = f"embd-{answered_id(request, body.request_id)}"
        ends = await while_connected(
            request, _pooled(request, body, answer_id, routing, inputs, backend, settings)
        )
        headers = routing_headers([end.routing for end in ends])
        answer = _answer(answer_id, body, ends)
        few = sum(len(end.pooled or ()) for end in ends) <= _INLINE_VALUES
        dumped = answer.dump() if few else await asyncio.to_thread(answer.dump)
        return Response(dumped, media_type="application/json", headers=headers)


def _check(body: EmbeddingBody, backend: Backend, settings: Settings) -> None:
    at_most(len(body.input), settings.max_embedding_inputs, "input", "max_embedding_inputs, in texts")
    if body.timeout is not None and settings.max_timeout_seconds is not None:
        at_most(body.timeout, settings.max_timeout_seconds, "timeout", "max_timeout_seconds")
    if body.dimensions is not None and body.dimensions > backend.state_size:
        raise InvalidRequestError(
            f"dimensions is {body.dimensions}; the states of this model have {backend.state_size}. Ask for that "
            "many at most.",
            param="dimensions",
        )


async def _pooled(
    request: Request,
    body: EmbeddingBody,
    answer_id: str,
    routing: RoutingChoice,
    inputs: Sequence[tuple[int, ...]],
    backend: Backend,
    settings: Settings,
) -> list[Finished]:
    """The end of every input's sequence, in order.

    A few at a time, so that a long list takes part in the queue and does not fill it.
    """
    timeout = settings.max_timeout_seconds if body.timeout is None else body.timeout
    deadline = None if timeout is None else request.state.arrived + timeout

    def requests(first: int) -> Iterator[GenerationRequest]:
        for index, ids in enumerate(inputs[first : first + settings.max_batch], first):
            yield GenerationRequest(
                id=f"{answer_id}-{index}",
                prompt_ids=ids,
                sampling=_NOTHING,
                routing=routing,
                priority=body.priority,
                deadline=deadline,
                client=request.state.client,
                pooling=body.pooling,
            )

    ends: list[Finished] = []
    while len(ends) < len(inputs):
        with named_by(body.model, body.gates):
            batch = Batch.admit(backend, requests(len(ends)))
        try:
            ends += [done.end for done in await batch.collect() if done.end is not None]
        finally:
            batch.close()
    return ends


def _answer(answer_id: str, body: EmbeddingBody, ends: Sequence[Finished]) -> EmbeddingAnswer:
    tokens = sum(end.usage.prompt_tokens for end in ends)
    data = [
        EmbeddingItem(
            index=index,
            embedding=_vector(body, end),
            routing=None if end.routing is None else RoutingAnswer.of(end.routing),
        )
        for index, end in enumerate(ends)
    ]
    return EmbeddingAnswer(
        id=answer_id,
        created=int(time.time()),
        model=body.model,
        data=data,
        usage={"prompt_tokens": tokens, "total_tokens": tokens},
        routing=data[0].routing if len(data) == 1 else None,
    )


def _vector(body: EmbeddingBody, end: Finished) -> list[float] | str:
    if end.pooled is None:
        raise RequestFailedError("The engine ended this request without a vector; send it again.")
    values = np.asarray(end.pooled[: body.dimensions], dtype=np.float64)
    length = float(np.linalg.norm(values))
    if body.normalize and length:
        values = values / length
    short = values.astype("<f4")
    if body.encoding_format == "base64":
        return base64.b64encode(short.tobytes()).decode()
    numbers: list[float] = short.tolist()
    return numbers
