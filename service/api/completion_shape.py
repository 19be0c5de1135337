"""`text_completion`: raw text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.generation import Completed
from service.api.scores import ScoreTeller, joined
from service.api.shapes import Scores, Telling, routing_of
from service.api.tokens import Places, TokenTexts
from service.api.wire.answers import CompletionChoice, CompletionLogprobs
from service.core import Finished, TextDelta

PLAIN = Telling()


@dataclass(frozen=True, slots=True)
class Echo:
    """How choices begin with their prompts.

    Attributes:
        texts: of the prompts.
        scored: likeliest tokens told of each of their tokens; None scores none.
        alone: nothing follows them.
    """

    texts: Sequence[str]
    scored: int | None = None
    alone: bool = False


class CompletionShape:
    """`text_completion`.

    Args:
        texts: of single tokens.
        prompts: token ids of each.
        telling: what choices carry besides their text.
        echo: what they begin with, if anything.
        n: choices a prompt.
    """

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        texts: TokenTexts,
        prompts: Sequence[tuple[int, ...]] = (),
        telling: Telling = PLAIN,
        echo: Echo | None = None,
        n: int = 1,
    ) -> None:
        self._texts = texts
        self._scores = ScoreTeller(texts, telling)
        self._prompts = prompts
        self._telling = telling
        self._echo = echo
        self._n = n
        self._places: dict[int, Places] = {}
        self._begun: set[int] = set()

    def head(self, prompt: Scores) -> Mapping[str, Any]:
        """Nothing: choices have prompts of their own."""
        return {}

    def first_head(self) -> Mapping[str, Any]:
        """Nothing, either."""
        return {}

    def whole(self, index: int, made: Completed, end: Finished, prompt: Scores) -> CompletionChoice:
        """A finished choice, with what it echoes in front."""
        first = self.opening(index, prompt)
        alone = self._echo is not None and self._echo.alone
        text, logprobs = ("", None) if alone else ("".join(made.text), self._report(index, made.scores))
        if first is not None:
            text = first.text + text
            if first.logprobs is not None:
                logprobs = first.logprobs if logprobs is None else joined(first.logprobs, logprobs)
        told: dict[str, Any] = {}
        if self._telling.token_ids:
            told["token_ids"] = [] if alone else made.token_ids
            told["prompt_token_ids"] = list(self._prompts[index // self._n])
        if self._telling.prompt_scores is not None:
            told["prompt_logprobs"] = self._scores.prompt(prompt, self._telling.prompt_scores)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason="length" if alone else end.reason,
            stop_reason=None if alone else end.stop_reason,
            routing=routing_of(end),
            **told,
        )

    def opening(self, index: int, prompt: Scores) -> CompletionChoice | None:
        """The prompt, if it is to be echoed."""
        echo = self._echo
        if echo is None:
            return None
        text, logprobs = echo.texts[index // self._n], None
        if echo.scored is not None:
            logprobs = self._scores.echoed(text, self._prompts[index // self._n], prompt, echo.scored)
        return CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=None, **self._ids(index, ())
        )

    def delta(self, index: int, piece: TextDelta) -> CompletionChoice | None:
        """A piece of text."""
        if self._echo is not None and self._echo.alone:
            return None
        ids = self._ids(index, piece.token_ids)
        if not (piece.text or piece.logprobs or ids):
            return None
        logprobs = self._report(index, piece.logprobs)
        return CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=None, **ids)

    def closing(self, index: int, end: Finished) -> CompletionChoice:
        """An empty text with the reason."""
        alone = self._echo is not None and self._echo.alone
        return CompletionChoice(
            index=index,
            text="",
            logprobs=None,
            finish_reason="length" if alone else end.reason,
            stop_reason=None if alone else end.stop_reason,
            routing=routing_of(end),
        )

    def _report(self, index: int, scores: Scores) -> CompletionLogprobs | None:
        if not self._telling.scored:
            return None
        start = len(self._echo.texts[index // self._n]) if self._echo is not None else 0
        places = self._places.setdefault(index, Places(self._texts, start))
        return self._scores.completion(scores, places)

    def _ids(self, index: int, tokens: Sequence[int]) -> dict[str, Any]:
        """The ids of a piece, if they are asked for; of the prompt with a choice's first."""
        if not self._telling.token_ids:
            return {}
        told: dict[str, Any] = {"token_ids": list(tokens)} if tokens else {}
        if index not in self._begun:
            self._begun.add(index)
            told["prompt_token_ids"] = list(self._prompts[index // self._n])
        return told
