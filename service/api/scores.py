"""Log-probabilities as answers tell them: OpenAI's two shapes, and vLLM's of a prompt."""

from collections.abc import Sequence

from service.api.shapes import Scores, Telling
from service.api.tokens import Places, TokenTexts
from service.api.wire.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from service.core import TokenLogprobs

IMPOSSIBLE = -9999.0
"""What OpenAI and vLLM write for minus infinity, which JSON has not."""


class ScoreTeller:
    """Writes scores down.

    Args:
        texts: of single tokens.
        telling: how tokens are named, and which take no room in the text.
    """

    def __init__(self, texts: TokenTexts, telling: Telling) -> None:
        self._texts = texts
        self._telling = telling

    def completion(self, scores: Scores, places: Places) -> CompletionLogprobs:
        """The older shape; the tokens lie at the next of `places`."""
        hides, special = self._telling.hides_special, self._texts.is_special
        return CompletionLogprobs(
            tokens=[self._name(score.token) for score in scores],
            token_logprobs=[_number(score.logprob) for score in scores],
            top_logprobs=[self._likeliest(score) for score in scores],
            text_offset=[places.put(score.token, hidden=hides and special(score.token)) for score in scores],
        )

    def echoed(self, text: str, ids: Sequence[int], prompt: Scores, count: int) -> CompletionLogprobs:
        """The older shape of a prompt: `text`, whose tokens but the first have scores.

        Args:
            text: the prompt.
            ids: its tokens.
            prompt: scores of all but the first.
            count: likeliest tokens to tell at each place.
        """
        places = Places(self._texts)
        offsets = [places.put(token) for token in ids]
        # What the tokenizer put in front of a text, a special token or a space, is not in that text.
        added = max(places.next - len(text), 0)
        return CompletionLogprobs(
            tokens=[self._name(token) for token in ids],
            token_logprobs=[None, *(_number(score.logprob) for score in prompt)],
            top_logprobs=[None, *(self._likeliest(score, count) for score in prompt)],
            text_offset=[min(max(offset - added, 0), len(text)) for offset in offsets],
        )

    def chat(self, scores: Scores) -> ChatLogprobs:
        """The newer shape."""
        content = [
            TokenLogprob(
                token=self._name(score.token),
                logprob=_number(score.logprob),
                bytes=list(self._texts.bytes_of(score.token)),
                top_logprobs=[self._top(token, value) for token, value in score.top],
            )
            for score in scores
        ]
        return ChatLogprobs(content=content, refusal=None)

    def prompt(self, prompt: Scores, count: int) -> PromptLogprobs:
        """vLLM's shape of a prompt whose tokens but the first have scores."""
        return [None, *(self._ranked(score, count) for score in prompt)]

    def _ranked(self, score: TokenLogprobs, count: int) -> dict[str, PromptLogprob]:
        ranked = [(score.token, score.logprob, score.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(score.top[:count], 1)]
        return {
            str(token): PromptLogprob(
                logprob=_number(value), rank=rank, decoded_token=self._texts.text_of(token)
            )
            for token, value, rank in ranked
        }

    def _likeliest(self, score: TokenLogprobs, count: int | None = None) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in (*score.top[:count], (score.token, score.logprob)):
            # Two tokens of one text: the likelier one.
            found.setdefault(self._name(token), _number(value))
        return found

    def _top(self, token: int, value: float) -> TopLogprob:
        return TopLogprob(
            token=self._name(token), logprob=_number(value), bytes=list(self._texts.bytes_of(token))
        )

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._telling.by_id else self._texts.text_of(token)


def joined(one: CompletionLogprobs, other: CompletionLogprobs) -> CompletionLogprobs:
    """The scores of two texts, one after the other."""
    return CompletionLogprobs(
        tokens=one.tokens + other.tokens,
        token_logprobs=one.token_logprobs + other.token_logprobs,
        top_logprobs=one.top_logprobs + other.top_logprobs,
        text_offset=one.text_offset + other.text_offset,
    )


def _number(value: float) -> float:
    return max(value, IMPOSSIBLE)
