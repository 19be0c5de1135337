"""One body to one answer, for both generating endpoints; they differ in their shapes alone."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request, Response

from service.api.backend import Backend
from service.api.generation import Batch, Completed, Piece, while_connected
from service.api.plan import Plan, named_by
from service.api.sse import EventStream
from service.api.wire.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    CompletionChoice,
    Generated,
    RoutingAnswer,
    UsageAnswer,
)
from service.api.wire.sampling import SamplingBody
from service.core import Finished, TextDelta, Usage
from service.settings import Settings

AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice


class Shape(Protocol):
    """What an endpoint's answers look like."""

    prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, end: Finished) -> CompletionChoice | ChatChoice:
        """A finished choice."""
        ...

    def opening(self, index: int) -> AnyChoice | None:
        """What a choice's stream begins with, if anything."""
        ...

    def delta(self, index: int, text: str) -> AnyChoice:
        """A piece of text."""
        ...

    def closing(self, index: int, end: Finished) -> AnyChoice:
        """What a choice's stream ends with."""
        ...


class CompletionShape:
    """`text_completion`."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, index: int, text: str, end: Finished) -> CompletionChoice:
        """A finished choice."""
        return CompletionChoice(
            index=index,
            text=text,
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            logprobs=None,
            routing=_routing(end),
        )

    def opening(self, index: int) -> None:
        """Nothing."""
        return

    def delta(self, index: int, text: str) -> CompletionChoice:
        """A piece of text."""
        return CompletionChoice(index=index, text=text, finish_reason=None, logprobs=None)

    def closing(self, index: int, end: Finished) -> CompletionChoice:
        """An empty text with the reason."""
        return self.whole(index, "", end)


class ChatShape:
    """`chat.completion`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, end: Finished) -> ChatChoice:
        """A finished turn."""
        return ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", content=text),
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            logprobs=None,
            routing=_routing(end),
        )

    def opening(self, index: int) -> ChatChunkChoice:
        """The role."""
        return ChatChunkChoice(
            index=index, delta=ChatDelta(role="assistant", content=""), finish_reason=None, logprobs=None
        )

    def delta(self, index: int, text: str) -> ChatChunkChoice:
        """A piece of text."""
        return ChatChunkChoice(index=index, delta=ChatDelta(content=text), finish_reason=None, logprobs=None)

    def closing(self, index: int, end: Finished) -> ChatChunkChoice:
        """An empty delta with the reason."""
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(),
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            logprobs=None,
            routing=_routing(end),
        )


def _routing(end: Finished) -> RoutingAnswer | None:
    return None if end.routing is None else RoutingAnswer.of(end.routing)


def _usage(ends: Sequence[Finished], n: int) -> UsageAnswer:
    """Each prompt once, every choice's tokens."""
    return UsageAnswer.of(
        Usage(
            prompt_tokens=sum(end.usage.prompt_tokens for end in ends[::n]),
            completion_tokens=sum(end.usage.completion_tokens for end in ends),
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
        ends = [choice.end for choice in choices if choice.end is not None]
        made: list[AnyChoice] = [
            self.shape.whole(index, "".join(choice.text), choice.end)
            for index, choice in enumerate(choices)
            if choice.end is not None
        ]
        answer = Generated(
            id=self.id,
            object=self.shape.whole_object,
            created=self.created,
            model=self.body.model,
            choices=made,
            usage=_usage(ends, self.plan.n),
        )
        if len(self.plan.prompts) > 1:
            return answer
        return answer.model_copy(update={"routing": made[0].routing})

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
        total = len(self.plan.prompts) * self.plan.n
        for index in range(total):
            opening = self.shape.opening(index)
            if opening is not None:
                yield self._chunk(opening).dump()
        ends: dict[int, Finished] = {}
        piece: Piece | None = first
        while piece is not None:
            index, event = piece
            if isinstance(event, TextDelta):
                if event.text:
                    yield self._chunk(self.shape.delta(index, event.text)).dump()
            else:
                ends[index] = event
                closing = self.shape.closing(index, event)
                yield self._chunk(closing).model_copy(update={"routing": closing.routing}).dump()
            piece = await anext(rest, None)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            usage = _usage([ends[index] for index in sorted(ends)], self.plan.n)
            yield self._chunk(None).model_copy(update={"usage": usage}).dump()


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
        batch = Batch.admit(backend, plan.requests(under_way.id))
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
