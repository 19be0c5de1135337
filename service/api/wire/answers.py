"""Answers in OpenAI's shapes; `routing` is our addition."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from service.core import RoutingOutcome, StepMode, Usage


class Answer(BaseModel):
    """Base of every answer: made by us, so it is not validated twice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def dump(self) -> bytes:
        """JSON."""
        return self.model_dump_json().encode()


class RoutingAnswer(Answer):
    """What made an answer: weights added to the shared expert, and the generations they came from."""

    gates: Mapping[str, float]
    pattern: str
    mode: StepMode
    generations: Mapping[str, int]
    router_generation: int | None
    confidence: float | None
    abstained: bool = False
    explored: bool = False

    @classmethod
    def of(cls, outcome: RoutingOutcome) -> Self:
        """From the engine's word."""
        return cls(
            gates=outcome.gates,
            pattern=outcome.pattern,
            mode=outcome.mode,
            generations=outcome.generations,
            router_generation=outcome.router_generation,
            confidence=outcome.confidence,
            abstained=outcome.abstained,
            explored=outcome.explored,
        )


class PromptTokens(Answer):
    """Of a prompt's tokens: those whose keys and values were found in the prefix cache."""

    cached_tokens: int


class UsageAnswer(Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """With the sum."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokens(cached_tokens=usage.cached_tokens),
        )


class CompletionLogprobs(Answer):
    """Log-probabilities in the older shape: lists with one entry a token.

    Attributes:
        tokens: their texts; `bytes:` and hexadecimals where one is no whole character.
        token_logprobs: null for a prompt's first token, which nothing predicts.
        top_logprobs: text → log-probability of the likeliest tokens and of the token itself.
        text_offset: where in the choice's text each begins, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Answer):
    """One token that could have been.

    Attributes:
        bytes: of its text, also where that is no whole character.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One token of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities in the newer shape."""

    content: list[TokenLogprob]
    refusal: None = None


class Ending(Answer):
    """What is null in every piece of a choice but its last."""

    finish_reason: str | None
    stop_reason: str | int | None = None
    routing: RoutingAnswer | None = None


class _Text(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None


class CompletionChoice(Ending, _Text):
    """A raw completion, or a piece of one."""


class ChatMessage(Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class _Message(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatChoice(Ending, _Message):
    """A turn."""


class ChatDelta(Answer):
    """A piece of a turn; the first names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class _Delta(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None


class ChatChunkChoice(Ending, _Delta):
    """A piece of a turn, in a stream."""


class Generated(Answer):
    """An answer of a generating endpoint, or one chunk of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: UsageAnswer | None = None
    routing: RoutingAnswer | None = None

    def dump(self) -> bytes:
        """JSON of what was set: a chunk in the middle of a stream has no usage, not even a null one."""
        return self.model_dump_json(exclude_unset=True).encode()


class ModelAnswer(Answer):
    """One name that `model` can be."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["twinserve"] = "twinserve"
    kind: Literal["router", "expert", "shared", "classifier"]
    max_model_len: int
    generation: int | None = None


class ModelList(Answer):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class RouteChoice(RoutingAnswer):
    """What the router says about one input."""

    index: int
    scores: Mapping[str, float]


class RouteAnswer(Answer):
    """What the router says."""

    object: Literal["list"] = "list"
    model: str
    data: list[RouteChoice]
    usage: Mapping[str, int]


class ExpertAnswer(Answer):
    """One expert as operators see it."""

    name: str
    generation: int
    state: str
    routed: bool
    leases: int
    bytes: int
    max_rank: int
    resident: bool


class ExpertList(Answer):
    """All experts."""

    object: Literal["list"] = "list"
    data: list[ExpertAnswer]


class RegisteredAnswer(ExpertAnswer):
    """A new generation, with what its compression cost."""

    report: Mapping[str, Any]


class ErrorFields(Answer):
    """What went wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """Every answer of a status from 400."""

    error: ErrorFields
