"""`chat.completion`: the assistant's turn, with the calls of tools that it holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.api.call_reader import CallPiece, CallReader, pieces_joined, read_whole
from service.api.generation import Completed
from service.api.scores import ScoreTeller
from service.api.shapes import Scores, Telling, routing_of
from service.api.tokens import TokenTexts
from service.api.wire.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from service.core import Finished, TextDelta

PLAIN = Telling()


class ChatShape:
    """`chat.completion`.

    Args:
        texts: of single tokens.
        prompt: token ids of the rendered chat.
        telling: what answers carry besides their text.
        reader: makes what finds calls of tools in one choice; None looks for none.
    """

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        texts: TokenTexts,
        prompt: Sequence[int] = (),
        telling: Telling = PLAIN,
        reader: Callable[[], CallReader] | None = None,
    ) -> None:
        self._scores = ScoreTeller(texts, telling)
        self._prompt = prompt
        self._telling = telling
        self._reader = reader
        self._readers: dict[int, CallReader] = {}

    def head(self, prompt: Scores) -> Mapping[str, Any]:
        """What is asked for of the prompt."""
        told = dict(self.first_head())
        if self._telling.prompt_scores is not None:
            told["prompt_logprobs"] = self._scores.prompt(prompt, self._telling.prompt_scores)
        return told

    def first_head(self) -> Mapping[str, Any]:
        """The prompt's ids, if they are asked for."""
        return {"prompt_token_ids": list(self._prompt)} if self._telling.token_ids else {}

    def whole(self, index: int, made: Completed, end: Finished, prompt: Scores) -> ChatChoice:
        """A finished turn."""
        text, calls = "".join(made.text), list[CallPiece]()
        if self._reader is not None:
            text, calls = read_whole(self._reader(), text)
        return ChatChoice(
            index=index,
            message=_message(text, calls),
            logprobs=self._report(made.scores),
            finish_reason=_reason(end, called=bool(calls)),
            stop_reason=end.stop_reason,
            routing=routing_of(end),
            **self._ids(made.token_ids),
        )

    def opening(self, index: int, prompt: Scores) -> ChatChunkChoice:
        """The role."""
        return ChatChunkChoice(
            index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
        )

    def delta(self, index: int, piece: TextDelta) -> ChatChunkChoice | None:
        """A piece of text, or of calls."""
        delta: ChatDelta | None = ChatDelta(content=piece.text)
        if self._reader is not None:
            read = self._of(index).push(piece.text)
            delta = _delta(*pieces_joined(read)) if read else None
        elif not piece.text:
            delta = None
        ids = self._ids(piece.token_ids) if piece.token_ids else {}
        if delta is None and not piece.logprobs and not ids:
            return None
        return ChatChunkChoice(
            index=index,
            delta=delta or ChatDelta(content=""),
            logprobs=self._report(piece.logprobs),
            finish_reason=None,
            **ids,
        )

    def closing(self, index: int, end: Finished) -> ChatChunkChoice:
        """The reason, with what was held back for a call that did not come."""
        rest, called = ChatDelta(), False
        if self._reader is not None:
            reader = self._of(index)
            read = reader.finish()
            rest, called = _delta(*pieces_joined(read)) if read else rest, reader.calls > 0
        return ChatChunkChoice(
            index=index,
            delta=rest,
            logprobs=None,
            finish_reason=_reason(end, called=called),
            stop_reason=end.stop_reason,
            routing=routing_of(end),
        )

    def _of(self, index: int) -> CallReader:
        """The reader of a streamed choice."""
        if index not in self._readers:
            assert self._reader is not None
            self._readers[index] = self._reader()
        return self._readers[index]

    def _report(self, scores: Scores) -> ChatLogprobs | None:
        return self._scores.chat(scores) if self._telling.scored else None

    def _ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self._telling.token_ids else {}


def _message(text: str, calls: Sequence[CallPiece]) -> ChatMessage:
    if not calls:
        return ChatMessage(role="assistant", content=text)
    told = [
        ToolCall(
            id=call.id or "",
            type="function",
            function=FunctionCall(name=call.name or "", arguments=call.arguments),
        )
        for call in calls
    ]
    return ChatMessage(role="assistant", content=text or None, tool_calls=told)


def _delta(text: str, calls: Sequence[CallPiece]) -> ChatDelta:
    told: dict[str, Any] = {"content": text} if text else {}
    if calls:
        told["tool_calls"] = [_call_delta(call) for call in calls]
    return ChatDelta(**told)


def _call_delta(call: CallPiece) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
    return ToolCallDelta(
        index=call.index,
        id=call.id,
        type="function",
        function=FunctionDelta(name=call.name, arguments=call.arguments),
    )


def _reason(end: Finished, *, called: bool) -> str:
    """A turn that calls ends for the calls' sake, unless it was cut."""
    return "tool_calls" if called and end.reason == "stop" else end.reason
