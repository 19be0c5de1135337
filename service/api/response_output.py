"""What a model says → output items of `/v1/responses`, each change told as an event of its stream.

A whole answer is what the events of a streamed one add up to: both are made here.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from service.api.call_reader import CallPiece, CallReader, Read
from service.api.wire.answers import TokenLogprob
from service.api.wire.response_answers import CallOutput, ItemStatus, MessageOutput, OutputText
from service.core import Finished, TextDelta, TokenLogprobs

Event = dict[str, Any]
"""`type` and what belongs to it; numbered by whoever sends it."""


class OutputWriter:
    """Writes one answer; `items` are whole when `finish` has been read to its end.

    Args:
        reader: finds calls of tools; None takes all for text.
        scored: what is told of the log-probabilities of tokens; None tells nothing.
    """

    def __init__(
        self,
        reader: CallReader | None,
        scored: Callable[[Sequence[TokenLogprobs]], list[TokenLogprob]] | None,
    ) -> None:
        self.items: list[MessageOutput | CallOutput] = []
        self._reader = reader
        self._scored = scored
        self._open: MessageOutput | CallOutput | None = None
        self._text: list[str] = []
        self._scores: list[TokenLogprob] = []
        self._new: list[TokenLogprob] = []

    def take(self, delta: TextDelta) -> Iterator[Event]:
        """New text of the answer."""
        if self._scored is not None:
            self._new += self._scored(delta.logprobs)
        read: Sequence[Read] = [delta.text] if delta.text else []
        yield from self._write(read if self._reader is None else self._reader.push(delta.text))

    def finish(self, end: Finished) -> Iterator[Event]:
        """The end of the answer."""
        if self._reader is not None:
            yield from self._write(self._reader.finish())
        if self._open is None and not self.items:
            yield from self._begin_message()
        yield from self._close("incomplete" if end.reason == "length" else "completed")

    def cut(self) -> Iterator[Event]:
        """The answer breaks off."""
        yield from self._close("incomplete")

    def _write(self, read: Sequence[Read]) -> Iterator[Event]:
        for one in read:
            if isinstance(one, CallPiece):
                yield from self._call(one)
            elif one:
                yield from self._say(one)

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, MessageOutput):
            yield from self._close("completed")
            yield from self._begin_message()
        self._text.append(text)
        new, self._new = self._new, []
        self._scores += new
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=_dumped(new))

    def _begin_message(self) -> Iterator[Event]:
        yield from self._begin(MessageOutput(id=_id("msg"), status="in_progress", content=[]))
        yield self._event("content_part.added", content_index=0, part=OutputText(text="").model_dump())

    def _call(self, piece: CallPiece) -> Iterator[Event]:
        if piece.name is not None:
            yield from self._close("completed")
            call = CallOutput(
                id=_id("fc"), status="in_progress", call_id=piece.id or "", name=piece.name, arguments=""
            )
            yield from self._begin(call)
        if piece.arguments:
            self._text.append(piece.arguments)
            yield self._event("function_call_arguments.delta", delta=piece.arguments)

    def _begin(self, item: MessageOutput | CallOutput) -> Iterator[Event]:
        self._open, self._text, self._scores = item, [], []
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items),
            "item": item.model_dump(),
        }

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        item, text = self._open, "".join(self._text)
        if item is None:
            return
        if isinstance(item, MessageOutput):
            part = OutputText(text=text, logprobs=self._scores + self._new)
            self._new = []
            scores = _dumped(part.logprobs)
            yield self._event("output_text.done", content_index=0, text=text, logprobs=scores)
            yield self._event("content_part.done", content_index=0, part=part.model_dump())
            done: MessageOutput | CallOutput = item.model_copy(update={"status": status, "content": [part]})
        else:
            yield self._event("function_call_arguments.done", name=item.name, arguments=text)
            done = item.model_copy(update={"status": status, "arguments": text})
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.items),
            "item": done.model_dump(),
        }
        self.items.append(done)
        self._open = None

    def _event(self, kind: str, **told: Any) -> Event:
        """Something about the open item."""
        assert self._open is not None
        return {
            "type": f"response.{kind}",
            "item_id": self._open.id,
            "output_index": len(self.items),
            **told,
        }


def _dumped(scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [score.model_dump() for score in scores]


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
