"""`POST /v1/chat/completions`: text messages, tools and calls of them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.api.wire.base import UNSUPPORTED_FIELD, Neutral, WireModel, at_fault
from service.api.wire.sampling import SHARED_NEUTRAL, SamplingBody
from service.api.wire.tools import CalledTools, NamedTool, Tool, ToolChoice, Tools


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

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(WireModel):
    """One turn.

    Attributes:
        content: required but of an assistant's turn that calls tools.
        name: of who speaks; templates may read it.
        tool_call_id: of the call that a tool's turn answers.
        tool_calls: what the assistant called.
    """

    unsupported: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning_content": ("",),
        "refusal": (),
    }

    role: Role
    content: Content | None = Field(default=None)
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    tool_calls: CalledTools = Field(default=[])

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise at_fault("tool_calls", "is for turns of the assistant alone")
        if self.tool_call_id is not None and self.role != "tool":
            raise at_fault("tool_call_id", "is for turns of a tool alone")
        if self.role == "tool" and self.tool_call_id is None:
            raise at_fault("tool_call_id", "a tool's turn needs the id of the call that it answers")
        return self

    @model_validator(mode="before")
    @classmethod
    def _says_something(cls, data: Any) -> Any:
        """Without content a turn must call; a missing field is told by its own name."""
        if isinstance(data, dict) and data.get("content") is None:
            if data.get("role") == "assistant" and data.get("tool_calls"):
                return data
            raise at_fault("content", "a turn needs it, but for an assistant's that calls tools")
        return data

    def described(self) -> dict[str, Any]:
        """As templates expect it: a developer speaks as the system, and nothing is None."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [call.described() for call in self.tool_calls]
        return turn


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]

_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
TemplateVariables = Annotated[
    dict[Annotated[str, StringConstraints(pattern=_VARIABLE)], Any], Field(max_length=64)
]


class TemplatedChat(WireModel):
    """How messages become a prompt; of every body that holds a chat."""

    tools: Tools = Field(default=[], description="functions that the model may call")
    add_generation_prompt: bool | None = Field(
        default=None, description="vLLM's: end where the assistant begins; false with continue_final_message"
    )
    continue_final_message: bool = Field(
        default=False, description="vLLM's: the answer goes on with the last message, the assistant's"
    )
    chat_template_kwargs: TemplateVariables = Field(
        default={}, description="vLLM's: further variables that the model's template reads"
    )

    @model_validator(mode="after")
    def _one_ending(self) -> "TemplatedChat":
        if self.continue_final_message and self.add_generation_prompt:
            raise at_fault("continue_final_message", "cannot be true together with add_generation_prompt")
        return self


class ChatBody(SamplingBody, TemplatedChat):
    """A request for the next turn of a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "embedded", "messages": [{"role": "user", "content": "Conjugate walk"}]},
                {
                    "model": "embedded",
                    "messages": [{"role": "user", "content": "Translate to Spanish: root vegetable"}],
                    "gates": {"spanish": 0.7, "french": 0.3},
                    "max_completion_tokens": 32,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
                {
                    "model": "assistant",
                    "messages": [{"role": "user", "content": "How warm is it in Rome?"}],
                    "tools": [
                        {
                            "type": "function",
                            "function": {
                                "name": "temperature",
                                "parameters": {
                                    "type": "object",
                                    "properties": {"city": {"type": "string"}},
                                    "required": ["city"],
                                },
                            },
                        }
                    ],
                    "tool_choice": "auto",
                },
            ]
        }
    )

    unsupported: ClassVar[Neutral] = {
        **SHARED_NEUTRAL,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
        # vLLM's
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
    }

    messages: Messages
    tool_choice: ToolChoice | None = Field(
        default=None, description="none, auto, required, or one function; auto where there are tools"
    )
    parallel_tool_calls: bool = Field(default=True, description="false: one call at most")
    add_special_tokens: bool = Field(
        default=False, description="vLLM's: the tokenizer's own before the template's text"
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    prompt_cache_key: str | None = Field(
        default=None, max_length=512, description="opaque; prompts that begin alike are found without it"
    )
    safety_identifier: str | None = Field(default=None, max_length=512, description="opaque, as `user`")
    logprobs: bool = Field(default=False, description="log-probabilities of each token of the answer")
    top_logprobs: int | None = Field(default=None, ge=0, description="and of that many likeliest ones")

    reported_by: ClassVar[str] = "top_logprobs"

    @property
    def reported(self) -> int | None:
        """`top_logprobs`, where `logprobs` is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def calls(self) -> bool:
        """Calls are looked for in the answer."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def demanded(self) -> list[Tool]:
        """The tools one of which must be called; none where the model may just answer."""
        if self.tool_choice == "required":
            return list(self.tools)
        if not isinstance(self.tool_choice, NamedTool):
            return []
        return [tool for tool in self.tools if tool.function.name == self.tool_choice.name]

    @model_validator(mode="after")
    def _chosen_tool_exists(self) -> "ChatBody":
        needs = self.tool_choice is not None and self.tool_choice not in ("none", "auto")
        if needs and not self.tools:
            raise at_fault("tool_choice", "there are no tools to choose from; send tools")
        if needs and not self.demanded:
            raise at_fault("tool_choice", "names no function of tools")
        return self
