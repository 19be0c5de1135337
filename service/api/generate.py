"""One body to one answer, for both generating endpoints; they differ in their shapes alone."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from service.api.backend import Backend
from service.api.generation import Batch, Completed, Piece, begun, while_connected
from service.api.headers import routing_headers
from service.api.naming import named_by
from service.api.plan import Plan
from service.api.shapes import AnyChoice, Scores, Shape, routing_of
from service.api.sse import EventStream
from service.api.wire.answers import Generated, UsageAnswer
from service.api.wire.sampling import SamplingBody, StreamOptions
from service.core import Finished, TextDelta, Usage
from service.settings import Settings


def _usage(ends: Sequence[Finished], plan: Plan) -> UsageAnswer:
    """Each prompt once, every choice's tokens. The further choices of a prompt always find it cached."""
    firsts = ends[:: plan.n]
    made = 0 if plan.prompt_only else sum(end.usage.completion_tokens for end in ends)
    return UsageAnswer.of(
        Usage(
            prompt_tokens=sum(end.usage.prompt_tokens for end in firsts),
            completion_tokens=made,
            cached_tokens=sum(end.usage.cached_tokens for end in firsts),
        )
    )


@dataclass(frozen=True, slots=True)
class _Answering:
    """An answer under way."""

    id: str
    created: int
    body: SamplingBody
    plan: Plan
    shape: Shape

    def whole(self, choices: Sequence[Completed]) -> Generated:
        """The answer in one piece."""
        ends = {index: choice.end for index, choice in enumerate(choices) if choice.end is not None}
        made: list[AnyChoice] = [
            self.shape.whole(index, choices[index], end, self._prompt_scores(index, ends))
            for index, end in ends.items()
        ]
        answer = Generated(
            id=self.id,
            object=self.shape.whole_object,
            created=self.created,
            model=self.body.model,
            choices=made,
            usage=_usage(list(ends.values()), self.plan),
            **self.shape.head(self._prompt_scores(0, ends)),
        )
        if len(self.plan.prompts) > 1:
            return answer
        return answer.model_copy(update={"routing": made[0].routing})

    def _prompt_scores(self, index: int, ends: Mapping[int, Finished]) -> Scores:
        """They come with the end of a prompt's first choice."""
        return ends[index - index % self.plan.n].prompt_logprobs or ()

    def _chunk(self, choice: AnyChoice | None, **told: Any) -> bytes:
        return Generated(
            id=self.id,
            object=self.shape.chunk_object,
            created=self.created,
            model=self.body.model,
            choices=[] if choice is None else [choice],
            **told,
        ).dump()

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The answer in chunks: opening, text, closing of each choice, then the usage if asked for."""
        ends: dict[int, Finished] = {}
        options = self.body.stream_options or StreamOptions()
        made = [0] * (len(self.plan.prompts) * self.plan.n)

        def so_far(index: int) -> dict[str, Any]:
            if not options.continuous_usage_stats:
                return {}
            prompt = self.plan.prompts[index // self.plan.n]
            return {"usage": UsageAnswer.so_far(len(prompt), made[index])}

        if self.body.prompt_reported is not None:
            # A stream begins with its prompt's scores, which come last: nothing can be sent before.
            held = [piece async for piece in pieces]
            ends = {index: event for index, event in held if isinstance(event, Finished)}
            pieces = _replayed(held)
        for index in range(len(made)):
            opening = self.shape.opening(index, self._prompt_scores(index, ends) if ends else ())
            if opening is not None:
                yield self._chunk(opening, **so_far(index), **self.shape.first_head())
        async for index, event in pieces:
            if isinstance(event, TextDelta):
                made[index] += 0 if self.plan.prompt_only else len(event.token_ids)
                delta = self.shape.delta(index, event)
                if delta is not None:
                    yield self._chunk(delta, **so_far(index))
            else:
                ends[index] = event
                closing = self.shape.closing(index, event)
                yield self._chunk(closing, **so_far(index), routing=closing.routing)
        if options.include_usage:
            told = [ends[index] for index in sorted(ends)]
            routed = {"routing": routing_of(told[0])} if len(self.plan.prompts) == 1 else {}
            yield self._chunk(None, usage=_usage(told, self.plan), **routed)


async def _replayed(held: Sequence[Piece]) -> AsyncIterator[Piece]:
    for piece in held:
        yield piece


async def noted(pieces: AsyncIterator[Piece], seen: list[Piece]) -> AsyncIterator[Piece]:
    """The same, and the first is put into `seen`."""
    async for piece in pieces:
        if not seen:
            seen.append(piece)
        yield piece


async def answer(
    request: Request, body: SamplingBody, plan: Plan, shape: Shape, backend: Backend, settings: Settings
) -> Response:
    """Generate a plan: as one JSON object, or as a stream that starts once the first event is there.

    Until then every refusal and failure has its HTTP status; a client that hangs up ends the work. A stream that
    waits longer than `keepalive_seconds` for it starts nevertheless, with comments: what fails later is an event.

    Raises:
        TwinserveError: refused at admission, or failed before the answer began.
        ClientGoneError: the client hung up before the answer began.
    """
    answer_id = f"{shape.prefix}-{answered_id(request, body.request_id)}"
    plan = await plan.compiled(backend)
    under_way = _Answering(id=answer_id, created=int(time.time()), body=body, plan=plan, shape=shape)
    with named_by(body.model, body.gates):
        client, arrived = request.state.client, request.state.arrived
        batch = Batch.admit(backend, plan.requests(under_way.id, client, arrived))
    try:
        if not body.stream:
            choices = await while_connected(request, batch.collect())
            outcomes = [choice.end.routing if choice.end is not None else None for choice in choices]
            return Response(
                under_way.whole(choices).dump(),
                media_type="application/json",
                headers=routing_headers(outcomes),
            )
        seen: list[Piece] = []
        pieces = await begun(request, noted(batch.pieces(), seen), settings.keepalive_seconds)
    except BaseException:
        batch.close()
        raise
    stream = EventStream(under_way.chunks(pieces), batch.close, settings.keepalive_seconds)
    if seen and len(plan.prompts) == 1:
        _, first = seen[0]
        stream.headers.update(routing_headers([first.routing]))
    return stream


def answered_id(request: Request, named: str | None) -> str:
    """As vLLM: the header's, the one that the body names, or the one that the log has."""
    known = str(request.state.request_id)
    given = request.headers.get("x-request-id") == known
    return known if given or named is None else named
