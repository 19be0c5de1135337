"""Tells the events of a request to `/generate` as LoRAX does."""

from collections.abc import AsyncIterator
from typing import Literal

from service.api.compat.running import Pieces
from service.api.compat.wire.lorax import (
    AlternativeToken,
    BestOfSequence,
    Details,
    GenerateAnswer,
    Parameters,
    PrefillToken,
    StreamAnswer,
    StreamDetails,
    Token,
)
from service.api.plan import Plan
from service.api.scores import IMPOSSIBLE
from service.api.tokens import TokenTexts
from service.api.wire.answers import RoutingAnswer
from service.core import Finished, TextDelta, TokenLogprobs

_OF_SEQUENCE = ("finish_reason", "generated_tokens", "seed", "prefill", "tokens")


class Answering:
    """The events of one request.

    Args:
        inputs: the prompt as the client wrote it.
        seed: of the first choice, where the client or the server chose one.
        listed: the answer is the one item of a list.
    """

    def __init__(
        self,
        inputs: str,
        parameters: Parameters,
        seed: int | None,
        plan: Plan,
        texts: TokenTexts,
        *,
        listed: bool,
    ) -> None:
        self._front = inputs if parameters.return_full_text else ""
        self._parameters = parameters
        self._seed = seed
        self._prompt = plan.prompts[0]
        self._texts = texts
        self._listed = listed

    async def whole(self, pieces: Pieces) -> bytes:
        """The answer; of several choices the one whose tokens are the likeliest on average."""
        choices: dict[int, _Choice] = {}
        ends: dict[int, Finished] = {}
        async for index, event in pieces:
            choice = choices.setdefault(index, self._new_choice())
            if isinstance(event, TextDelta):
                choice.put(event)
            else:
                ends[index] = event
        ranked = sorted(choices, key=lambda index: (-choices[index].mean, index))
        sequences = [self._sequence(index, choices[index], ends[index], ends[0]) for index in ranked]
        best, end = sequences[0], ends[ranked[0]]
        details = None
        if self._wants_details:
            details = Details(
                **{name: getattr(best, name) for name in _OF_SEQUENCE},
                prompt_tokens=end.usage.prompt_tokens,
                best_of_sequences=sequences[1:] or None,
            )
        answer = GenerateAnswer(
            generated_text=best.generated_text,
            details=details,
            routing=None if end.routing is None else RoutingAnswer.of(end.routing),
        )
        return b"[" + answer.dump() + b"]" if self._listed else answer.dump()

    async def chunks(self, pieces: Pieces) -> AsyncIterator[bytes]:
        """An event a token. The last one says how it ended, so that each waits for the next."""
        choice = self._new_choice()
        told = 0
        async for _, event in pieces:
            if isinstance(event, TextDelta):
                choice.put(event)
                while told < len(choice.tokens) - 1:
                    yield StreamAnswer(token=choice.tokens[told], generated_text=None, details=None).dump()
                    told += 1
            elif choice.tokens:
                details = StreamDetails(
                    finish_reason=_reason(event),
                    prompt_tokens=event.usage.prompt_tokens,
                    generated_tokens=event.usage.completion_tokens,
                    seed=self._told_seed(0),
                )
                yield StreamAnswer(
                    token=choice.tokens[-1],
                    generated_text=self._front + "".join(choice.text),
                    details=details if self._parameters.details else None,
                    routing=None if event.routing is None else RoutingAnswer.of(event.routing),
                ).dump()

    @property
    def _wants_details(self) -> bool:
        return self._parameters.details or self._parameters.decoder_input_details

    def _new_choice(self) -> "_Choice":
        return _Choice(self._texts, alternatives=self._parameters.return_k_alternatives is not None)

    def _sequence(self, index: int, choice: "_Choice", end: Finished, leader: Finished) -> BestOfSequence:
        return BestOfSequence(
            generated_text=self._front + "".join(choice.text),
            finish_reason=_reason(end),
            generated_tokens=end.usage.completion_tokens,
            seed=self._told_seed(index),
            prefill=self._prefill(leader) if self._parameters.decoder_input_details else [],
            tokens=choice.tokens if self._wants_details else [],
        )

    def _prefill(self, leader: Finished) -> list[PrefillToken]:
        scores = leader.prompt_logprobs or ()
        logprobs = [None, *(max(score.logprob, IMPOSSIBLE) for score in scores)]
        return [
            PrefillToken(id=token, text=self._texts.text_of(token), logprob=logprob)
            for token, logprob in zip(self._prompt, logprobs, strict=True)
        ]

    def _told_seed(self, index: int) -> int | None:
        """The seed that gives choice `index` alone; none where nothing is drawn."""
        if self._seed is None or not self._parameters.sampled:
            return None
        return (self._seed + index) % 2**64


class _Choice:
    """One choice as it comes: its text, and its tokens where they are scored.

    What a token adds to the text is its text, so that those of all tokens which are not special make up the whole.
    A character, or what might become a stop sequence, comes with the token that settles it.

    Args:
        alternatives: tell the likeliest tokens too.
    """

    def __init__(self, texts: TokenTexts, *, alternatives: bool) -> None:
        self.text: list[str] = []
        self.tokens: list[Token] = []
        self._texts = texts
        self._alternatives = alternatives
        self._untold = ""

    @property
    def mean(self) -> float:
        """Log-probability of a token on average."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else 0.0

    def put(self, event: TextDelta) -> None:
        """Take what came."""
        self.text.append(event.text)
        self._untold += event.text
        for score in event.logprobs:
            self.tokens.append(self._token(score))
        if self._untold and self.tokens and not event.logprobs and not self.tokens[-1].special:
            # Text that was held back until the end belongs to the last token.
            last = self.tokens[-1]
            self.tokens[-1] = last.model_copy(update={"text": last.text + self._untold})
            self._untold = ""

    def _token(self, score: TokenLogprobs) -> Token:
        special = self._texts.is_special(score.token)
        if special:
            text = self._texts.bytes_of(score.token).decode(errors="replace")
        else:
            text, self._untold = self._untold, ""
        return Token(
            id=score.token,
            text=text,
            logprob=max(score.logprob, IMPOSSIBLE),
            special=special,
            alternative_tokens=[self._alternative(*one) for one in score.top] if self._alternatives else None,
        )

    def _alternative(self, token: int, logprob: float) -> AlternativeToken:
        return AlternativeToken(id=token, text=self._texts.text_of(token), logprob=max(logprob, IMPOSSIBLE))


def _reason(end: Finished) -> Literal["length", "eos_token", "stop_sequence"]:
    if end.reason == "length":
        return "length"
    return "stop_sequence" if isinstance(end.stop_reason, str) else "eos_token"
