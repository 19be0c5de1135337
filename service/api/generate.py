"""One body to one answer, for both generating endpoints; they differ in their shapes alone."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from service.api.backend import Backend
from service.api.generation import Batch, Completed, Piece, while_connected
from service.api.plan import Plan, named_by
from service.api.shapes import AnyChoice, Scores, Shape
from service.api.sse import EventStream
from service.api.wire.answers import Generated, UsageAnswer
from service.api.wire.sampling import SamplingBody
from service.core import Finished, TextDelta, Usage
from service.settings import Settings


def _usage(ends: Sequence[Finished], n: int) -> UsageAnswer:
    """Each prompt once, every choice's tokens. The further choices of a prompt always find it cached."""
    return UsageAnswer.of(
        Usage(
            prompt_tokens=sum(end.usage.prompt_tokens for end in ends[::n]),
            completion_tokens=sum(end.usage.completion_tokens for end in ends),
            cached_tokens=sum(end.usage.cached_tokens for end in ends[::n]),
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
            self.shape.whole(
                index,
                "".join(choices[index].text),
                choices[index].scores,
                end,
                self._prompt_scores(index, ends),
            )
            for index, end in ends.items()
        ]
        answer = Generated(
            id=self.id,
            object=self.shape.whole_object,
            created=self.created,
            model=self.body.model,
            choices=made,
            usage=_usage(list(ends.values()), self.plan.n),
        )
        if len(self.plan.prompts) > 1:
            return answer
        return answer.model_copy(update={"routing": made[0].routing})

    def _prompt_scores(self, index: int, ends: Mapping[int, Finished]) -> Scores:
        """They come with the end of a prompt's first choice."""
        return ends[index - index % self.plan.n].prompt_logprobs or ()

    def _chunk(self, choice: AnyChoice | None) -> Generated:
        return Generated(
            id=self.id,
            object=self.shape.chunk_object,
            created=self.created,
            model=self.body.model,
            choices=[] if choice is None else [choice],
        )

    async def chunks(self, first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The answer in chunks: opening, text, closing of each choice, then the usage if asked for."""
        ends: dict[int, Finished] = {}
        pieces = _chained(first, rest)
        if self.body.prompt_reported is not None:
            # A stream begins with its prompt's scores, which come last: nothing can be sent before.
            held = [piece async for piece in pieces]
            ends = {index: event for index, event in held if isinstance(event, Finished)}
            pieces = _replayed(held)
        for index in range(len(self.plan.prompts) * self.plan.n):
            opening = self.shape.opening(index, self._prompt_scores(index, ends) if ends else ())
            if opening is not None:
                yield self._chunk(opening).dump()
        async for index, event in pieces:
            if isinstance(event, TextDelta):
                if event.text or event.logprobs:
                    yield self._chunk(self.shape.delta(index, event)).dump()
            else:
                ends[index] = event
                closing = self.shape.closing(index, event)
                yield self._chunk(closing).model_copy(update={"routing": closing.routing}).dump()
        options = self.body.stream_options
        if options is not None and options.include_usage:
            usage = _usage([ends[index] for index in sorted(ends)], self.plan.n)
            yield self._chunk(None).model_copy(update={"usage": usage}).dump()


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


async def _replayed(held: Sequence[Piece]) -> AsyncIterator[Piece]:
    for piece in held:
        yield piece


async def answer(
    request: Request, body: SamplingBody, plan: Plan, shape: Shape, backend: Backend, settings: Settings
) -> Response:
    """Generate a plan: as one JSON object, or as a stream that starts once the first event is there.

    Until then every refusal and failure has its HTTP status; a client that hangs up ends the work.

    Raises:
        TwinserveError: refused at admission, or failed before the answer began.
        ClientGoneError: the client hung up before the answer began.
    """
    under_way = _Answering(
        id=f"{shape.prefix}-{uuid.uuid4().hex}", created=int(time.time()), body=body, plan=plan, shape=shape
    )
    with named_by(body.model, body.gates):
        client, arrived = request.state.client, request.state.arrived
        batch = Batch.admit(backend, plan.requests(under_way.id, client, arrived))
    try:
        if not body.stream:
            choices = await while_connected(request, batch.collect())
            return Response(under_way.whole(choices).dump(), media_type="application/json")
        pieces: AsyncIterator[Piece] = batch.pieces()
        first = await while_connected(request, anext(pieces))
    except BaseException:
        batch.close()
        raise
    return EventStream(under_way.chunks(first, pieces), batch.close, settings.keepalive_seconds)
