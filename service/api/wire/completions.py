"""`POST /v1/completions`."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from service.api.wire.base import Neutral
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

    unsupported: ClassVar[Neutral] = {
        **SHARED_NEUTRAL,
        "add_special_tokens": (True,),
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Prompt
    echo: bool = Field(default=False, description="the text begins with the prompt")
    logprobs: int | None = Field(
        default=None, ge=0, description="log-probabilities of each token and of that many likeliest ones"
    )

    @property
    def reported(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    @property
    def prompt_reported(self) -> int | None:
        """`logprobs`, where the prompt is part of the answer."""
        return self.logprobs if self.echo else None
