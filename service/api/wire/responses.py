"""`POST /v1/responses`: the stateless part of OpenAI's newer API."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from service.api.wire.base import Neutral, WireModel, at_fault
from service.api.wire.fields import Metadata, Stop, Temperature
from service.api.wire.lora import Lora
from service.api.wire.request import RequestFields
from service.api.wire.response_input import Items, chat_of
from service.api.wire.tools import FunctionName, NamedTool, Parameters

MODES = ("none", "auto", "required")
LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""The second may be asked for, though no model here has any."""


def _include(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of strings")
    for item in value:
        if item not in _INCLUDED:
            raise ValueError(f"{item[:64]!r} is not supported by this server; it has {LOGPROBS!r}")
    return tuple(value)


def _format(value: Any) -> dict[str, Any]:
    """A text format, as `response_format` of a chat has it."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        raise ValueError('must be {"type": "text"}, "json_object" or "json_schema"')
    rest = {name: given for name, given in value.items() if name != "type" and given is not None}
    if value["type"] != "json_schema":
        if rest:
            raise ValueError(f"{value['type']} takes no field {min(rest)!r}")
        return {"type": value["type"]}
    unknown = rest.keys() - {"name", "schema", "strict", "description"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    if "name" not in rest or "schema" not in rest:
        raise ValueError("a json_schema needs name and schema")
    return {"type": "json_schema", "json_schema": rest}


Include = Annotated[
    tuple[str, ...],
    PlainValidator(_include),
    WithJsonSchema({"type": "array", "items": {"enum": list(_INCLUDED)}}),
]
Format = Annotated[
    dict[str, Any],
    PlainValidator(_format),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "name": {"type": "string"},
                "description": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["type"],
            "additionalProperties": False,
        }
    ),
]


class TextOptions(WireModel):
    """What the answer's text must be."""

    unsupported: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: Format = Field(default={"type": "text"})


class Reasoning(WireModel):
    """Models here do not reason apart from their answer."""

    unsupported: ClassVar[Neutral] = {
        "effort": ("none",),
        "generate_summary": (),
        "summary": (),
    }


class ResponseTool(WireModel):
    """One function; OpenAI's other tools run on its own servers."""

    unsupported: ClassVar[Neutral] = {"defer_loading": (False,)}

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Parameters = Field(default={}, description="JSON Schema of its arguments, an object")
    strict: bool = False

    def chat(self) -> dict[str, Any]:
        """As a chat has it."""
        function = {"name": self.name, "parameters": self.parameters, "strict": self.strict}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


def _choice(value: Any) -> str | NamedTool:
    if isinstance(value, str) and value in MODES:
        return value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or value != {"type": "function", "name": name}:
        raise ValueError('must be none, auto, required, or {"type": "function", "name": "…"}')
    return NamedTool(name)


_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
    "additionalProperties": False,
}
Choice = Annotated[
    str | NamedTool, PlainValidator(_choice), WithJsonSchema({"anyOf": [{"enum": list(MODES)}, _NAMED]})
]


class ResponseStreamOptions(WireModel):
    """Nothing is padded, whatever a client says of it."""

    include_obfuscation: bool = False


class ResponsesBody(RequestFields):
    """A request for the next part of a conversation, all of which it holds: nothing is stored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "shared", "instructions": "Be brief.", "input": "Say hello."}]
        }
    )

    unsupported: ClassVar[Neutral] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "truncation": ("disabled",),
    }

    input: Items
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0)
    include: Include = ()
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions = TextOptions()
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] = Field(default=[])
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    metadata: Metadata = Field(default={}, description="opaque; nothing is stored, so it changes nothing")
    safety_identifier: str | None = Field(default=None, max_length=512, description="opaque")
    prompt_cache_key: str | None = Field(default=None, max_length=512, description="opaque")
    top_k: int = Field(default=0, ge=-1, description="vLLM's: 0 or -1 keeps all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="vLLM's")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10, description="vLLM's")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="as of a chat")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="as of a chat")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="as of a chat")
    stop: Stop = Field(default=(), description="as of a chat")
    min_tokens: int = Field(default=0, ge=0, description="vLLM's")
    ignore_eos: bool = Field(default=False, description="vLLM's")
    lora: Lora = Field(default=[], description="llama.cpp's: scales by the ids of GET /lora-adapters")

    @model_validator(mode="after")
    def _fits_together(self) -> "ResponsesBody":
        if self.top_logprobs and LOGPROBS not in self.include:
            raise at_fault("top_logprobs", f"is for include = [{LOGPROBS!r}] only")
        if self.stream_options is not None and not self.stream:
            raise at_fault("stream_options", "is for stream = true only")
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise at_fault("tools", f"the function {name!r} is defined twice")
        if self.tool_choice == "required" and not names:
            raise at_fault("tool_choice", "there are no tools to choose from; send tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise at_fault("tool_choice", "names no function of tools")
        return self

    @property
    def format_told(self) -> dict[str, Any]:
        """`text.format` as it came."""
        return {"type": self.text.format["type"], **self.text.format.get("json_schema", {})}

    def chat(self) -> dict[str, Any]:
        """The chat that asks for the same, as a body of `/v1/chat/completions`; neutral fields are left out."""
        fields = {name: getattr(self, name) for name in _SAME & self.model_fields_set}
        if self.stop:
            fields["stop"] = list(self.stop)
        fields |= {"messages": chat_of(self.instructions, self.input), "stream": self.stream}
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        if LOGPROBS in self.include:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.text.format["type"] != "text":
            fields["response_format"] = self.text.format
        if self.tools:
            fields["tools"] = [tool.chat() for tool in self.tools]
            fields["parallel_tool_calls"] = self.parallel_tool_calls
            fields["tool_choice"] = (
                self.tool_choice
                if isinstance(self.tool_choice, str)
                else {"type": "function", "function": {"name": self.tool_choice.name}}
            )
        return fields


_SAME = frozenset(
    {
        "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "seed", "min_tokens", "ignore_eos", "request_id", "priority", "timeout", "user",
        "metadata", "gates", "routing", "lora",
    }
)  # fmt: skip
"""Fields that mean the same in a chat."""
