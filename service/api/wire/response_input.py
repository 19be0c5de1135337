"""What `/v1/responses` reads: a text, or items of a conversation, told as the messages of a chat."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.api.wire.base import UNSUPPORTED_FIELD, Neutral, WireModel, at_fault
from service.api.wire.tools import FunctionName

_TEXTS = ("input_text", "output_text")
_IGNORED = ("annotations", "logprobs")
"""What a part of an earlier answer carries beside its text."""


def _text(value: Any) -> str:
    """A string, or a list of text parts, joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise ValueError('must be a string or a list of parts like {"type": "input_text", "text": "…"}')
    texts = []
    for index, part in enumerate(value):
        if part.get("type") not in _TEXTS:
            raise PydanticCustomError(UNSUPPORTED_FIELD, "no such part", {"name": f"[{index}].type"})
        if part.keys() - {"type", "text", *_IGNORED} or not isinstance(part.get("text"), str):
            raise ValueError(f'part {index} must be like {{"type": "{part["type"]}", "text": "…"}}')
        texts.append(part["text"])
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(_TEXTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Text = Annotated[
    str,
    PlainValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}),
]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class Item(WireModel):
    """A turn of anybody, a call in an earlier answer, or what a call came to.

    Attributes:
        role, content: of a message; an earlier answer's as it came.
        call_id: of a call and of its output.
        name, arguments: of a call.
        output: of a call's output.
        id, status: as the answer had them; they change nothing.
    """

    unsupported: ClassVar[Neutral] = {
        "async": (False,),
        "caller": (),
        "namespace": (),
        "phase": ("final_answer",),
    }

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | None = None
    call_id: _Name | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: Text | None = None
    id: _Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> "Item":
        needed = _FIELDS[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise at_fault(name, f"an item of type {self.type} needs it")
        for name in self.model_fields_set - {"type", "id", "status", *needed}:
            raise at_fault(name, f"an item of type {self.type} has no such field")
        return self


def _items(value: Any) -> Any:
    """A text is one message of the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[
    list[Item],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_items, json_schema_input_type=str | Annotated[list[Item], Field(min_length=1)]),
]


def chat_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Messages of `/v1/chat/completions`: calls of one turn together, behind what was said in it."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if item.type == "message":
            messages.append({"role": item.role, "content": item.content})
        elif item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    return messages
