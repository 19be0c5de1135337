"""`POST /v1/completions`."""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from service.api.wire.base import Neutral, at_fault
from service.api.wire.sampling import SHARED_NEUTRAL, SamplingBody

PromptItem = str | tuple[int, ...]
"""One prompt: text, or token ids."""


def parse_prompt(value: Any) -> tuple[PromptItem, ...]:
    """OpenAI's four forms of `prompt` → one or more prompts, none empty."""
    if isinstance(value, str):
        items: list[Any] = [value]
    elif isinstance(value, list) and value and all(type(item) is int for item in value):
        items = [value]
    elif isinstance(value, list):
        items = value
    else:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not items:
        raise ValueError("must not be empty")
    prompts: list[PromptItem] = []
    for index, item in enumerate(items):
        if isinstance(item, str) and isinstance(items[0], str):
            prompts.append(item)
        elif isinstance(item, list) and isinstance(items[0], list) and all(type(i) is int for i in item):
            prompts.append(tuple(item))
        else:
            raise ValueError(f"item {index} must be, like all others, a string or a list of token ids")
        if not item:
            raise ValueError("an empty prompt cannot be continued" + (f" (item {index})" if index else ""))
    return tuple(prompts)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
Prompt = Annotated[
    tuple[PromptItem, ...],
    PlainValidator(parse_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]


class CompletionBody(SamplingBody):
    """A request for raw completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "embedded", "prompt": "How is planet spelled?", "max_tokens": 16, "temperature": 0},
                {
                    "model": "embedded",
                    "prompt": ["Conjugate walk", "How is zebra spelled?"],
                    "routing": {"top_k": 1, "threshold": 0.2},
                    "logprobs": 2,
                    "seed": 7,
                },
                {"model": "spell", "prompt": [504, 314], "stream": True, "return_token_ids": True},
            ]
        }
    )

    unsupported: ClassVar[Neutral] = {
        **SHARED_NEUTRAL,
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Prompt
    max_tokens: int | None = Field(
        default=None, ge=0, description="16 where it is not given; 0 is for an echo alone"
    )
    add_special_tokens: bool = Field(
        default=True, description="vLLM's: the tokenizer's own around a prompt that is text"
    )
    echo: bool = Field(default=False, description="the text begins with the prompt")
    logprobs: int | None = Field(
        default=None, ge=0, description="log-probabilities of each token and of that many likeliest ones"
    )

    @model_validator(mode="after")
    def _something_to_say(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise at_fault("max_tokens", "must be at least 1; 0 is for echo = true alone")
        return self

    @property
    def reported(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    @property
    def prompt_reported(self) -> int | None:
        """`prompt_logprobs`; and `logprobs`, where the prompt is part of the answer."""
        asked = [count for count in (self.prompt_logprobs, self.echoed) if count is not None]
        return max(asked, default=None)

    @property
    def echoed(self) -> int | None:
        """Of `prompt_reported`, what the echoed prompt shows."""
        return self.logprobs if self.echo else None
