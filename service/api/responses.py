"""`/v1/responses`: OpenAI's newer API over the path of chats; stateless: a body holds all of its conversation."""

import contextlib
import json
import logging
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.api.backend import Backend
from service.api.chat import PreparedChat, prepare
from service.api.errors import from_validation, internal_error
from service.api.generate import answered_id, noted
from service.api.generation import Batch, Piece, begun, while_connected
from service.api.headers import routing_headers
from service.api.naming import named_by
from service.api.parts import Parts
from service.api.refusals import ANSWERED, GENERATING, Responses
from service.api.response_output import Event, OutputWriter
from service.api.scores import ScoreTeller
from service.api.sse import EventStream
from service.api.wire.answers import RoutingAnswer
from service.api.wire.chat import ChatBody
from service.api.wire.response_answers import (
    IncompleteDetails,
    ResponseAnswer,
    ResponseFault,
    ResponseUsage,
)
from service.api.wire.responses import ResponsesBody
from service.core import Finished, TextDelta
from service.errors import InvalidRequestError, QueueFullError, RequestFailedError, TwinserveError

_log = logging.getLogger(__name__)

_STREAMED = {
    "text/event-stream": {
        "schema": {"description": "Server-sent events."},
        "example": 'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", …}\n\n',
    }
}
_ANSWERS: Responses = {200: {**ANSWERED[200], "content": _STREAMED}, **GENERATING}

_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "messages": "input",
}
"""A chat's fields → those that ask for the same here."""


@contextlib.contextmanager
def _renamed() -> Iterator[None]:
    """Refusals of a chat, in the words of a response."""
    try:
        yield
    except TwinserveError as error:
        for theirs, ours in _NAMES.items():
            # Whole words: `max_messages` is a setting.
            error.message = re.sub(rf"\b{re.escape(theirs)}\b", ours, error.message)
            if error.param is not None and error.param.startswith(theirs):
                # Items of the input are not the chat's messages one by one.
                error.param = ours
        raise


def _chat(body: ResponsesBody) -> ChatBody:
    """The chat that asks for the same.

    Raises:
        InvalidRequestError: there is none.
    """
    try:
        return ChatBody.model_validate(body.chat())
    except ValidationError as error:
        told = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise from_validation(told) from error


@dataclass(slots=True)
class _Answering:
    """A response under way."""

    id: str
    body: ResponsesBody
    writer: OutputWriter
    created: int = field(default_factory=lambda: int(time.time()))
    sent: int = 0

    def told(self, **more: Any) -> ResponseAnswer:
        """The response as it is now."""
        body, choice = self.body, self.body.tool_choice
        return ResponseAnswer(
            **{
                "id": self.id,
                "created_at": self.created,
                "status": "in_progress",
                "instructions": body.instructions,
                "max_output_tokens": body.max_output_tokens,
                "model": body.model,
                "parallel_tool_calls": body.parallel_tool_calls,
                "temperature": body.temperature,
                "text": {"format": body.format_told},
                "tool_choice": choice
                if isinstance(choice, str)
                else {"type": "function", "name": choice.name},
                "tools": [tool.model_dump() for tool in body.tools],
                "top_logprobs": body.top_logprobs or 0,
                "top_p": body.top_p,
                "user": body.user,
                "metadata": body.metadata,
                **more,
            }
        )

    def ended(self, end: Finished) -> ResponseAnswer:
        """The whole response, once the writer has finished."""
        cut = end.reason == "length"
        usage = end.usage
        return self.told(
            status="incomplete" if cut else "completed",
            completed_at=None if cut else int(time.time()),
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            output=self.writer.items,
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details={"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                output_tokens=usage.completion_tokens,
                output_tokens_details={"reasoning_tokens": 0},
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            ),
            routing=None if end.routing is None else RoutingAnswer.of(end.routing),
        )

    def failed(self, error: TwinserveError) -> ResponseAnswer:
        """The response that ended in an error."""
        code = "server_error"
        if isinstance(error, InvalidRequestError):
            code = "invalid_prompt"
        elif isinstance(error, QueueFullError):
            code = "rate_limit_exceeded"
        fault = ResponseFault(code=code, message=error.message, type=error.code, param=error.param)
        return self.told(status="failed", error=fault, output=self.writer.items)

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The response as events, from `response.created` to the one that ends it."""
        yield self._response("created", self.told())
        yield self._response("in_progress", self.told())
        try:
            async for _, piece in pieces:
                if isinstance(piece, TextDelta):
                    for event in self.writer.take(piece):
                        yield self._framed(event)
                    continue
                for event in self.writer.finish(piece):
                    yield self._framed(event)
                whole = self.ended(piece)
                yield self._response(whole.status, whole)
        except Exception as error:  # noqa: BLE001 the status line is out; only an event can still say so
            if not isinstance(error, TwinserveError):
                _log.exception("stream failed")
                error = internal_error()
            for event in self.writer.cut():
                yield self._framed(event)
            yield self._response("failed", self.failed(error))

    def _response(self, kind: str, response: ResponseAnswer) -> bytes:
        return self._framed({"type": f"response.{kind}", "response": response.model_dump()})

    def _framed(self, event: Event) -> bytes:
        """One numbered event as it is sent."""
        kind = event["type"]
        data = json.dumps({**event, "sequence_number": self.sent}, allow_nan=False)
        self.sent += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()


async def _admitted(request: Request, under_way: _Answering, chat: PreparedChat, backend: Backend) -> Batch:
    client, arrived = request.state.client, request.state.arrived
    with _renamed():
        plan = await chat.plan.compiled(backend)
    with named_by(chat.body.model, chat.body.gates):
        return Batch.admit(backend, plan.requests(under_way.id, client, arrived))


async def _read(batch: Batch, writer: OutputWriter) -> Finished:
    """Have the whole answer written."""
    end: Finished | None = None
    async for _, piece in batch.pieces():
        if isinstance(piece, TextDelta):
            deque(writer.take(piece), maxlen=0)
        else:
            end = piece
            deque(writer.finish(piece), maxlen=0)
    if end is None:
        raise RequestFailedError("The engine ended this request without a result; send it again.")
    return end


def add_routes(router: APIRouter, parts: Parts) -> None:
    """Put `POST /v1/responses` on `router`."""
    keepalive = parts.settings.keepalive_seconds

    @router.post("/v1/responses", response_model=ResponseAnswer, responses=_ANSWERS)
    async def respond(request: Request, body: ResponsesBody) -> Response:
        """Go on with a conversation: as one object, or as OpenAI's typed events."""
        with _renamed():
            chat = await prepare(_chat(body), parts)
        teller = ScoreTeller(parts.texts, chat.telling)
        writer = OutputWriter(
            None if chat.reader is None else chat.reader(),
            (lambda scores: teller.chat(scores).content) if chat.telling.scored else None,
        )
        under_way = _Answering(f"resp_{answered_id(request, body.request_id)}", body, writer)
        batch = await _admitted(request, under_way, chat, parts.backend)
        try:
            if not body.stream:
                end = await while_connected(request, _read(batch, writer))
                return Response(
                    under_way.ended(end).dump(),
                    media_type="application/json",
                    headers=routing_headers([end.routing]),
                )
            seen: list[Piece] = []
            pieces = await begun(request, noted(batch.pieces(), seen), keepalive)
        except BaseException:
            batch.close()
            raise
        stream = EventStream(under_way.events(pieces), batch.close, keepalive, done=b"", framed=True)
        stream.headers.update(routing_headers([piece.routing for _, piece in seen]))
        return stream
