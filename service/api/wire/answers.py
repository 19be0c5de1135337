"""Answers in OpenAI's shapes; `routing` is our addition."""

from collections.abc import Mapping
from typing import Literal, Self

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
    prompt_tokens_details: PromptTokens | None = None

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """With the sum."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokens(cached_tokens=usage.cached_tokens),
        )

    @classmethod
    def so_far(cls, prompt_tokens: int, completion_tokens: int) -> Self:
        """Of an answer under way."""
        total = prompt_tokens + completion_tokens
        return cls(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


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


class PromptLogprob(Answer):
    """What the model thought of one token at a place of the prompt, in vLLM's shape.

    Attributes:
        rank: 1 for the likeliest.
    """

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By place: token id → what was thought of it; null for the first, which nothing predicts."""


class Ending(Answer):
    """What is null in every piece of a choice but its last."""

    finish_reason: str | None
    stop_reason: str | int | None = None
    routing: RoutingAnswer | None = None


class TokenIdsAnswer(Answer):
    """vLLM's, where `return_token_ids` asks for it."""

    token_ids: list[int] | None = None


class _Text(TokenIdsAnswer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(Ending, _Text):
    """A raw completion, or a piece of one."""


class FunctionCall(Answer):
    """A function and its arguments, a JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """One call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answer):
    """The assistant's turn; the content is null where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class _Message(TokenIdsAnswer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatChoice(Ending, _Message):
    """A turn."""


class FunctionDelta(Answer):
    """A piece of a call: the first has the name."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    """A piece of the call of that index; the first has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    """A piece of a turn; the first names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class _Delta(TokenIdsAnswer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None


class ChatChunkChoice(Ending, _Delta):
    """A piece of a turn, in a stream."""


class Generated(Answer):
    """An answer of a generating endpoint, or one chunk of its stream.

    Attributes:
        routing: of the only prompt; several have theirs in their choices.
        prompt_token_ids, prompt_logprobs: of a chat; a completion's choices have their own.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: UsageAnswer | None = None
    routing: RoutingAnswer | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def dump(self) -> bytes:
        """JSON of what was set: a chunk in the middle of a stream has no usage, not even a null one."""
        return self.model_dump_json(exclude_unset=True).encode()


class ModelAnswer(Answer):
    """One name that `model` can be.

    Attributes:
        root: the bundle that it belongs to; itself for a classifier.
        parent: what it is another name or another generation of; the bundle for an expert; null for the bundle.
        kind: generation: one that is tried out, or waits to be, beside the one that its expert's name stands for.
        generation: of an expert, of the expert behind an alias, or the one that it is.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["twinserve"] = "twinserve"
    root: str
    parent: str | None
    kind: Literal["router", "expert", "generation", "alias", "shared", "classifier"]
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


class ErrorFields(Answer):
    """What went wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """Every answer of a status from 400."""

    error: ErrorFields
