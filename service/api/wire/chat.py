"""`POST /v1/chat/completions`, in its plain form: text messages."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.api.wire.base import UNSUPPORTED_FIELD, Neutral, WireModel
from service.api.wire.sampling import SHARED_NEUTRAL, SamplingBody


def _content(value: Any) -> str:
    """A string, or a list of text parts, joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise ValueError('must be a string or a list of parts like {"type": "text", "text": "…"}')
    texts = []
    for index, part in enumerate(value):
        if part.get("type") != "text":
            raise PydanticCustomError(UNSUPPORTED_FIELD, "no such part", {"name": f"[{index}].type"})
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'part {index} must be exactly {{"type": "text", "text": "…"}}')
        texts.append(part["text"])
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}),
]


class Message(WireModel):
    """One turn."""

    unsupported: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "name": (),
        "reasoning_content": ("",),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatBody(SamplingBody):
    """A request for the next turn of a chat."""

    unsupported: ClassVar[Neutral] = {
        **SHARED_NEUTRAL,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_key": (),
        "reasoning_effort": ("none",),
        "safety_identifier": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
        # vLLM's
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
    }

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = Field(default=False, description="log-probabilities of each token of the answer")
    top_logprobs: int | None = Field(default=None, ge=0, description="and of that many likeliest ones")

    reported_by: ClassVar[str] = "top_logprobs"

    @property
    def reported(self) -> int | None:
        """`top_logprobs`, where `logprobs` is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
