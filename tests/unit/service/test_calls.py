"""Calls of tools found in what a model writes, in pieces of any size, and the grammar that demands them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from service.api.call_reader import CallPiece, pieces_joined, read_whole
from service.api.calling import BARE, TAGGED, CallStyle, call_style
from service.api.wire.tools import Tool
from service.errors import InvalidRequestError
from tests.fixtures.tiny import tiny_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": CITY}})
    for name in ("weather", "clock")
]


def whole(
    text: str, style: CallStyle = TAGGED, *, parallel: bool = True
) -> tuple[str, list[tuple[str, str]]]:
    content, calls = read_whole(style.reader(TOOLS, parallel=parallel), text)
    return content, [(call.name or "", call.arguments) for call in calls]


def in_pieces(texts: Sequence[str], style: CallStyle) -> tuple[str, list[tuple[str, str]]]:
    """What a client puts together of a stream."""
    reader = style.reader(TOOLS, parallel=True)
    content, calls = "", list[list[str]]()
    for read in (*(reader.push(text) for text in texts), reader.finish()):
        text, pieces = pieces_joined(read)
        content += text
        for piece in pieces:
            if piece.name is not None:
                assert piece.index == len(calls)
                assert piece.id
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    return content, [(name, arguments) for name, arguments in calls]


ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{ROME}\n</tool_call>", "", [("weather", '{"city": "Rome"}')]),
        (f"Let me see.\n\n<tool_call>{ROME}</tool_call>\n", "Let me see.", [("weather", '{"city": "Rome"}')]),
        (
            f"<tool_call>\n{ROME}\n</tool_call>\n<tool_call>\n{ROME.replace('weather', 'clock')}\n</tool_call>",
            "",
            [("weather", '{"city": "Rome"}'), ("clock", '{"city": "Rome"}')],
        ),
        ('<tool_call>{"arguments": {"a": [1, "}"]}, "name": "clock"}', "", [("clock", '{"a": [1, "}"]}')]),
        ('<tool_call>{"name": "clock"}</tool_call>', "", [("clock", "{}")]),
        ('<tool_call>{"name": "clock", "arguments": null}</tool_call>', "", [("clock", "{}")]),
        (
            '<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("clock", '{"a": 1}')],
        ),
        ('<tool_call>{"name": "clock", "arguments": {"a": "\\"}', "", [("clock", '{"a": "\\"}')]),
        ("plain text, <tool", "plain text, <tool", []),
        ("no <tool_call>call</tool_call>", "no<tool_call>call</tool_call>", []),
        (
            '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
            [],
        ),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('<tool_call>{"name": "clo', '<tool_call>{"name": "clo', []),
        ("  \n", "  \n", []),
    ],
)
def test_tagged_calls_are_found_and_the_rest_is_text(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert whole(text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", '{"city": "Rome"}')]),
        (
            '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {"a": 1}}',
            "",
            [("clock", "{}"), ("clock", '{"a": 1}')],
        ),
        ('The answer is {"name": "clock"}', 'The answer is {"name": "clock"}', []),
        ('{"temperature": 5}', '{"temperature": 5}', []),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("{not json", "{not json", []),
    ],
)
def test_an_answer_that_is_a_bare_object_of_a_known_function_is_a_call(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert whole(text, BARE) == (content, calls)


def test_without_parallel_calls_the_first_alone_is_told() -> None:
    text = f"<tool_call>{ROME}</tool_call>\n<tool_call>{ROME}</tool_call>"
    assert whole(text, parallel=False) == ("", [("weather", '{"city": "Rome"}')])
    assert whole(text[:-20], parallel=False) == ("", [("weather", '{"city": "Rome"}')])


PARTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "\n", " ", "text", ROME, ROME.replace("weather", "nobody"),
        '{"name": "clock"}', '{"name": ', '"clock"', ', "arguments": ', '{"a": "\\"}"}', "{", "}", '"', "<", "\\",
        ";",
    ]
)  # fmt: skip


@given(parts=st.lists(PARTS, max_size=12), cuts=st.lists(st.integers(0, 200)), bare=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_in_any_pieces_says_what_the_whole_does(
    parts: list[str], cuts: list[int], bare: bool
) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    style = BARE if bare else TAGGED
    found = whole(text, style)
    assert in_pieces(pieces, style) == found
    assert in_pieces(list(text), style) == found


def test_pieces_of_one_call_that_come_at_once_are_one() -> None:
    first, second = CallPiece(0, "{", "id", "f"), CallPiece(0, "}")
    assert pieces_joined(["a", first, second, "b"]) == ("ab", [CallPiece(0, "{}", "id", "f")])


def test_the_template_tells_how_calls_are_written() -> None:
    qwen = 'within XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}\\n</tool_call>'
    llama = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    assert call_style(qwen) is TAGGED
    assert call_style(llama) is BARE
    for other in ("{{ tools }}", "<tool_call><function=f></tool_call>", "[TOOL_CALLS]"):
        with pytest.raises(InvalidRequestError, match="does not read"):
            call_style(other)


@pytest.mark.parametrize("style", [TAGGED, BARE])
def test_the_grammar_lets_through_calls_of_the_tools_and_nothing_else(
    style: CallStyle, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))
    grammar = llguidance.grammar_from("lark", style.grammar(TOOLS, special=False, parallel=True))
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar)

    def passes(text: str) -> bool:
        matcher.reset()
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def call(name: str, arguments: object) -> str:
        text = json.dumps({"name": name, style.arguments: arguments}, ensure_ascii=False)
        return f"{style.opens}\n{text}\n{style.closes}" if style.opens else text

    rome = call("weather", {"city": "Rome"})
    between = "\n" if style.opens else "; "
    for good in (rome, call("clock", {"city": "é"}), between.join([rome] * 8)):
        assert passes(good)
        content, calls = read_whole(style.reader(TOOLS, parallel=True), good)
        assert not content
        assert calls
    for bad in ("", "text", call("nobody", {}), call("weather", {}), between.join([rome] * 9)):
        assert not passes(bad)
