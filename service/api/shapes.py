"""What the two generating endpoints' answers look like: whole choices, and the pieces of a streamed one."""

from collections.abc import Sequence
from typing import Protocol

from service.api.tokens import Places, TokenTexts
from service.api.wire.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    RoutingAnswer,
    TokenLogprob,
    TopLogprob,
)
from service.core import Finished, TextDelta, TokenLogprobs

AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice

Scores = Sequence[TokenLogprobs]

IMPOSSIBLE = -9999.0
"""What OpenAI and vLLM write for minus infinity, which JSON has not."""


class Shape(Protocol):
    """An endpoint's answers. One choice's pieces are asked for in their order."""

    prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, scores: Scores, end: Finished, prompt: Scores) -> AnyChoice:
        """A finished choice. `prompt`: scores of the prompt's tokens but the first."""
        ...

    def opening(self, index: int, prompt: Scores) -> AnyChoice | None:
        """What a choice's stream begins with, if anything."""
        ...

    def delta(self, index: int, piece: TextDelta) -> AnyChoice:
        """A piece of text."""
        ...

    def closing(self, index: int, end: Finished) -> AnyChoice:
        """What a choice's stream ends with."""
        ...


class CompletionShape:
    """`text_completion`.

    Args:
        scored: log-probabilities are asked for.
        echo: text and ids of each prompt, to begin its choices with; none is echoed if empty.
        n: choices a prompt.
    """

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        texts: TokenTexts,
        *,
        scored: bool = False,
        echo: Sequence[tuple[str, tuple[int, ...]]] = (),
        n: int = 1,
    ) -> None:
        self._texts = texts
        self._scored = scored
        self._echo = echo
        self._n = n
        self._places: dict[int, Places] = {}

    def whole(self, index: int, text: str, scores: Scores, end: Finished, prompt: Scores) -> CompletionChoice:
        """A finished choice, with what it echoes in front."""
        first = self.opening(index, prompt)
        logprobs = self._report(index, scores)
        if first is not None and first.logprobs is not None and logprobs is not None:
            logprobs = _joined(first.logprobs, logprobs)
        return CompletionChoice(
            index=index,
            text=(first.text if first is not None else "") + text,
            logprobs=logprobs,
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            routing=_routing(end),
        )

    def opening(self, index: int, prompt: Scores) -> CompletionChoice | None:
        """The prompt, if it is to be echoed."""
        if not self._echo:
            return None
        text, ids = self._echo[index // self._n]
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._report_prompt(text, ids, prompt) if self._scored else None,
            finish_reason=None,
        )

    def delta(self, index: int, piece: TextDelta) -> CompletionChoice:
        """A piece of text."""
        return CompletionChoice(
            index=index, text=piece.text, logprobs=self._report(index, piece.logprobs), finish_reason=None
        )

    def closing(self, index: int, end: Finished) -> CompletionChoice:
        """An empty text with the reason."""
        return CompletionChoice(
            index=index,
            text="",
            logprobs=None,
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            routing=_routing(end),
        )

    def _report(self, index: int, scores: Scores) -> CompletionLogprobs | None:
        if not self._scored:
            return None
        start = len(self._echo[index // self._n][0]) if self._echo else 0
        places = self._places.setdefault(index, Places(self._texts, start))
        special = self._texts.is_special
        return CompletionLogprobs(
            tokens=[self._texts.text_of(score.token) for score in scores],
            token_logprobs=[_number(score.logprob) for score in scores],
            top_logprobs=[self._likeliest(score) for score in scores],
            text_offset=[places.put(score.token, hidden=special(score.token)) for score in scores],
        )

    def _report_prompt(self, text: str, ids: tuple[int, ...], prompt: Scores) -> CompletionLogprobs:
        places = Places(self._texts)
        offsets = [places.put(token) for token in ids]
        # What the tokenizer put in front of a text, a special token or a space, is not in that text.
        added = max(places.next - len(text), 0)
        return CompletionLogprobs(
            tokens=[self._texts.text_of(token) for token in ids],
            token_logprobs=[None, *(_number(score.logprob) for score in prompt)],
            top_logprobs=[None, *(self._likeliest(score) for score in prompt)],
            text_offset=[min(max(offset - added, 0), len(text)) for offset in offsets],
        )

    def _likeliest(self, score: TokenLogprobs) -> dict[str, float] | None:
        found: dict[str, float] = {}
        for token, value in (*score.top, (score.token, score.logprob)):
            # Two tokens of one text: the likelier one.
            found.setdefault(self._texts.text_of(token), _number(value))
        return found


class ChatShape:
    """`chat.completion`.

    Args:
        scored: log-probabilities are asked for.
    """

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, scored: bool = False) -> None:
        self._texts = texts
        self._scored = scored

    def whole(self, index: int, text: str, scores: Scores, end: Finished, prompt: Scores) -> ChatChoice:
        """A finished turn."""
        return ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", content=text),
            logprobs=self._report(scores),
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            routing=_routing(end),
        )

    def opening(self, index: int, prompt: Scores) -> ChatChunkChoice:
        """The role."""
        return ChatChunkChoice(
            index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
        )

    def delta(self, index: int, piece: TextDelta) -> ChatChunkChoice:
        """A piece of text."""
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=piece.text),
            logprobs=self._report(piece.logprobs),
            finish_reason=None,
        )

    def closing(self, index: int, end: Finished) -> ChatChunkChoice:
        """An empty delta with the reason."""
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(),
            logprobs=None,
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            routing=_routing(end),
        )

    def _report(self, scores: Scores) -> ChatLogprobs | None:
        if not self._scored:
            return None
        content = [
            TokenLogprob(
                token=self._texts.text_of(score.token),
                logprob=_number(score.logprob),
                bytes=list(self._texts.bytes_of(score.token)),
                top_logprobs=[self._top(token, value) for token, value in score.top],
            )
            for score in scores
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _top(self, token: int, value: float) -> TopLogprob:
        return TopLogprob(
            token=self._texts.text_of(token),
            logprob=_number(value),
            bytes=list(self._texts.bytes_of(token)),
        )


def _joined(one: CompletionLogprobs, other: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=one.tokens + other.tokens,
        token_logprobs=one.token_logprobs + other.token_logprobs,
        top_logprobs=one.top_logprobs + other.top_logprobs,
        text_offset=one.text_offset + other.text_offset,
    )


def _number(value: float) -> float:
    return max(value, IMPOSSIBLE)


def _routing(end: Finished) -> RoutingAnswer | None:
    return None if end.routing is None else RoutingAnswer.of(end.routing)
