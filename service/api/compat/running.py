"""Another server's body, once it has become ours: checked, planned, generated, answered in whatever shape."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import Request, Response

from service.api.generation import Batch, Piece, begun, while_connected
from service.api.headers import routing_headers
from service.api.naming import named_by
from service.api.parts import Parts
from service.api.plan import Plan
from service.api.sse import EventStream
from service.api.wire.sampling import SamplingBody
from service.core import RoutingOutcome
from service.errors import TwinserveError
from service.record import current

Pieces = AsyncIterator[Piece]


class CompatBody(SamplingBody):
    """Our fields as another server's body filled them in.

    Attributes:
        likeliest: how many likeliest tokens to report beside each generated one; None reports nothing.
        likeliest_of_prompt: the same for the prompt's tokens.
    """

    reported_by: ClassVar[str] = "likeliest"

    likeliest: int | None = None
    likeliest_of_prompt: int | None = None

    @property
    def reported(self) -> int | None:
        """`likeliest`."""
        return self.likeliest

    @property
    def prompt_reported(self) -> int | None:
        """`likeliest_of_prompt`."""
        return self.likeliest_of_prompt


@dataclass(frozen=True, slots=True)
class Telling:
    """How an answer is told.

    Attributes:
        prefix: of its id.
        whole: all events → the JSON of the answer.
        chunks: all events → the JSON of each event of its stream.
        failure: an error in the middle of a stream → the JSON object that ends it.
    """

    prefix: str
    whole: Callable[[Pieces], Awaitable[bytes]]
    chunks: Callable[[Pieces], AsyncIterator[bytes]]
    failure: Callable[[TwinserveError], Mapping[str, Any]]


async def respond(request: Request, body: CompatBody, plan: Plan, telling: Telling, parts: Parts) -> Response:
    """Generate a plan: as one JSON text, or as a stream that starts once its first event is there.

    Raises:
        TwinserveError: refused at admission, or failed before the answer began.
        ClientGoneError: the client hung up before the answer began.
    """
    record = current()
    if record is not None and not record.model:
        record.model = body.model
    answer_id = f"{telling.prefix}-{uuid.uuid4().hex}"
    plan = await plan.compiled(parts.backend)
    with named_by(body.model, body.gates):
        requests = plan.requests(answer_id, request.state.client, request.state.arrived)
        batch = Batch.admit(parts.backend, requests)
    outcomes: dict[int, RoutingOutcome] = {}
    watched = _watched(batch.pieces(), outcomes)
    try:
        if not body.stream:
            content = await while_connected(request, telling.whole(watched))
            told = [outcomes.get(index) for index in range(len(plan.prompts) * plan.n)]
            return Response(content, media_type="application/json", headers=routing_headers(told))
        pieces = await begun(request, watched, parts.settings.keepalive_seconds)
    except BaseException:
        batch.close()
        raise
    stream = EventStream(
        telling.chunks(pieces),
        batch.close,
        parts.settings.keepalive_seconds,
        done=b"",
        failure=telling.failure,
    )
    if outcomes and len(plan.prompts) == 1:
        stream.headers.update(routing_headers(list(outcomes.values())))
    return stream


async def _watched(pieces: Pieces, outcomes: dict[int, RoutingOutcome]) -> AsyncGenerator[Piece, None]:
    """The same; what made each choice is put into `outcomes` as it becomes known."""
    async for index, event in pieces:
        if event.routing is not None:
            outcomes[index] = event.routing
        yield index, event
