"""How a model writes calls of functions, told from its chat template; a grammar that demands one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.api.call_reader import CallReader
from service.api.wire.tools import Tool
from service.errors import InvalidRequestError

_MOST_CALLS = 8
"""In one demanded answer: a small model would go on until its tokens are used up."""

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As templates print arguments; free whitespace would let a model write nothing else."""

_NOTHING = {"properties": {}, "additionalProperties": False}
"""As OpenAI: a function that says nothing of parameters has none."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How calls are written.

    Attributes:
        opens: before a call's object; empty where an answer that begins with an object is one.
        closes: after it; of bare objects, between two.
        arguments: the member that holds them.
    """

    opens: str
    closes: str
    arguments: str

    def reader(self, tools: Sequence[Tool], *, parallel: bool) -> CallReader:
        """What finds the calls in one answer."""
        names = {tool.function.name for tool in tools}
        return CallReader(names, self.opens, self.closes, parallel=parallel)

    def grammar(self, tools: Sequence[Tool], *, special: bool, parallel: bool) -> str:
        """A Lark grammar, as llguidance reads it, of answers that call one of the tools and say nothing else.

        Args:
            tools: to choose from.
            special: the marks around calls are special tokens.
            parallel: several calls may follow each other.
        """
        opens, closes = f"{self.opens}\n", f"\n{self.closes}"
        begin, end = _literal(opens), _literal(closes)
        if special:
            begin, end = f'{self.opens} "\\n"', f'"\\n" {self.closes}'
        between = _literal("\n")
        if not self.opens:
            begin, end, between = '""', '""', _literal(f"{self.closes} ")
        lines = [f"start: call ({between} call){{0,{_MOST_CALLS - 1}}}" if parallel else "start: call"]
        lines.append(f"call: {begin} object {end}" if self.opens else "call: object")
        lines.append("object: " + " | ".join(f"object_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.function.name)}, "{self.arguments}": '
            parameters = tool.function.parameters or _NOTHING
            schema: dict[str, Any] = {"type": "object", **parameters, "x-guidance": _SPACING}
            lines.append(f'object_{number}: {_literal(head)} arguments_{number} "}}"')
            lines.append(f"arguments_{number}: %json {json.dumps(schema)}")
        return "\n".join(lines)


TAGGED = CallStyle("<tool_call>", "</tool_call>", "arguments")
"""Hermes' and Qwen's."""

BARE = CallStyle("", ";", "parameters")
"""Llama 3's."""


def call_style(template: str) -> CallStyle:
    """The style that a chat template, which shows tools, teaches its model.

    Raises:
        InvalidRequestError: it is none that is known here.
    """
    text = template.replace('\\"', '"')
    if TAGGED.opens in text and '"arguments"' in text and "<function=" not in text:
        return TAGGED
    if '{"name":' in text and '"parameters"' in text:
        return BARE
    raise InvalidRequestError(
        "The chat template of this model shows tools, but has it call them in a way that this server does not "
        'read; known are <tool_call>{"name": …, "arguments": …}</tool_call> and bare {"name": …, "parameters": '
        "…}. Send tool_choice none to get the text as it is.",
        param="tools",
    )


def _literal(text: str) -> str:
    """A Lark string; JSON's escapes are among its own."""
    return json.dumps(text)
