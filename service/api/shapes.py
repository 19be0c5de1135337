"""What the generating endpoints' answers look like: whole choices, and the pieces of a streamed one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from service.api.generation import Completed
from service.api.wire.answers import ChatChoice, ChatChunkChoice, CompletionChoice, RoutingAnswer
from service.api.wire.sampling import SamplingBody
from service.core import Finished, TextDelta, TokenLogprobs

AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice

Scores = Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Telling:
    """What answers carry besides their text.

    Attributes:
        scored: log-probabilities of the answer's tokens.
        by_id: which name tokens by their ids.
        hides_special: special tokens have no place in the text.
        token_ids: ids of the prompt and of the answer.
        prompt_scores: likeliest tokens told at each place of the prompt; None tells nothing.
    """

    scored: bool = False
    by_id: bool = False
    hides_special: bool = True
    token_ids: bool = False
    prompt_scores: int | None = None

    @classmethod
    def of(cls, body: SamplingBody) -> Self:
        """What a body asks for."""
        return cls(
            scored=body.reported is not None,
            by_id=body.return_tokens_as_token_ids,
            hides_special=body.skip_special_tokens,
            token_ids=body.return_token_ids,
            prompt_scores=body.prompt_logprobs,
        )


class Shape(Protocol):
    """An endpoint's answers. One choice's pieces are asked for in their order."""

    prefix: str
    whole_object: str
    chunk_object: str

    def head(self, prompt: Scores) -> Mapping[str, Any]:
        """Fields that a whole answer has beside its choices. `prompt`: scores of its tokens but the first."""
        ...

    def first_head(self) -> Mapping[str, Any]:
        """Fields that a choice's first chunk has beside it."""
        ...

    def whole(self, index: int, made: Completed, end: Finished, prompt: Scores) -> AnyChoice:
        """A finished choice."""
        ...

    def opening(self, index: int, prompt: Scores) -> AnyChoice | None:
        """What a choice's stream begins with, if anything."""
        ...

    def delta(self, index: int, piece: TextDelta) -> AnyChoice | None:
        """A piece of text; None if there is nothing to say yet."""
        ...

    def closing(self, index: int, end: Finished) -> AnyChoice:
        """What a choice's stream ends with."""
        ...


def routing_of(end: Finished) -> RoutingAnswer | None:
    """What an answer says of its gates."""
    return None if end.routing is None else RoutingAnswer.of(end.routing)
