"""Functions that a chat's model may call: their definitions, the choice among them, and calls in a chat."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from service.api.wire.base import Neutral, WireModel

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""OpenAI's, and dots, which vLLM's clients use."""


def _schema(value: Any) -> dict[str, Any]:
    """A JSON Schema of an object: arguments always are one."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON Schema, an object")
    if value.get("type", "object") != "object":
        raise ValueError('must describe an object: "type": "object"')
    if not isinstance(value.get("properties", {}), dict):
        raise ValueError("'properties' must be an object of schemas")
    if not isinstance(value.get("required", []), list):
        raise ValueError("'required' must be a list of names")
    return value


Parameters = Annotated[dict[str, Any], PlainValidator(_schema), WithJsonSchema({"type": "object"})]


class FunctionSpec(WireModel):
    """One function."""

    name: FunctionName
    description: str | None = None
    parameters: Parameters = Field(default={}, description="JSON Schema of its arguments, an object")
    strict: bool = Field(
        default=False, description="OpenAI's; calls are held to the schema where tool_choice demands one"
    )


class Tool(WireModel):
    """One tool: OpenAI's other kinds run on its own servers."""

    type: Literal["function"]
    function: FunctionSpec

    def described(self) -> dict[str, Any]:
        """As templates expect it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


def _distinct(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the function {name!r} is defined twice")
    return tools


Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True), AfterValidator(_distinct)]


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one function that must be called."""

    name: str


_MODES = ("none", "auto", "required")


def _choice(value: Any) -> str | NamedTool:
    if isinstance(value, str) and value in _MODES:
        return value
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or value != {"type": "function", "function": {"name": name}}:
        raise ValueError('must be none, auto, required, or {"type": "function", "function": {"name": "…"}}')
    return NamedTool(name)


_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
ToolChoice = Annotated[
    str | NamedTool, PlainValidator(_choice), WithJsonSchema({"anyOf": [{"enum": list(_MODES)}, _NAMED]})
]


def _arguments(value: Any) -> dict[str, Any]:
    """OpenAI's text of a JSON object, read: templates want the object."""
    if not isinstance(value, str):
        raise ValueError("must be a string that holds a JSON object")
    try:
        read = json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a string that holds a JSON object: {error}") from error
    if not isinstance(read, dict):
        raise ValueError("must be a string that holds a JSON object")
    return read


class CalledFunction(WireModel):
    """A function and what it was called with."""

    name: FunctionName
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments), WithJsonSchema({"type": "string"})] = (
        Field(default={})
    )


class CalledTool(WireModel):
    """A call in an earlier turn of the assistant's."""

    unsupported: ClassVar[Neutral] = {"index": tuple(range(128))}

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def described(self) -> dict[str, Any]:
        """As templates expect it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


CalledTools = Annotated[list[CalledTool], Field(max_length=128, fail_fast=True)]
