"""Structured output over HTTP: OpenAI's client and fields, vLLM's fields, and what is refused."""

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.api.harness import Served, error_of

CHAT = [{"role": "user", "content": "Who is it?"}]
COLD = {"temperature": 0.8, "max_tokens": 150}
TIGHT = {"whitespace_flexible": False}
"""A model of random weights likes whitespace."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
    "x-guidance": TIGHT,
}


class Person(BaseModel):
    kind: Literal["person"]
    age: int = Field(ge=0, le=99)
    rank: Literal["low", "high"] | None


def format_of(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


@pytest.mark.parametrize("strict", [True, False])
def test_the_official_client_gets_json_of_its_schema(client: openai.OpenAI, strict: bool) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, response_format=format_of(SCHEMA, strict=strict), n=3, seed=1, **COLD
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_the_official_client_parses_into_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Person, seed=4, max_tokens=200, temperature=0.3
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert person.kind == "person"


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": CHAT, "response_format": format_of(SCHEMA), "seed": 7, **COLD}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(stream=True, **asked)
        if chunk.choices
    ]
    assert len(pieces) > 2
    assert "".join(pieces) == whole
    jsonschema.validate(json.loads(whole), SCHEMA)


def test_who_rambles_is_cut_by_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        response_format=format_of({"type": "string", "minLength": 100}),
        max_tokens=12,
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_vllms_fields_through_the_official_client(client: openai.OpenAI) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"structured_outputs": {"regex": "[a-c]{3}"}}, "[a-c]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"], "disable_fallback": True}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "[ab]"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "[ab]"),
        ({"guided_regex": "[a-c]{3}", "guided_decoding_backend": "xgrammar"}, "[a-c]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "[ab]"),
    ]
    for extra, pattern in asked:
        answer = client.chat.completions.create(model="tiny", messages=CHAT, extra_body=extra, **COLD)
        assert re.fullmatch(pattern, answer.choices[0].message.content), extra
        text = client.completions.create(model="tiny", prompt="Add", extra_body=extra, **COLD).choices[0].text
        assert re.fullmatch(pattern, text), extra


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"response_format": format_of(SCHEMA)},
    ],
)
def test_a_schema_in_any_of_its_fields(server: Served, fields: dict[str, Any]) -> None:
    answer = server.complete(**fields, **COLD, seed=2)
    jsonschema.validate(json.loads(answer["choices"][0]["text"]), SCHEMA)


def test_a_json_object_in_either_field(server: Served) -> None:
    (close,) = server.runtime.tokenizer.encode("}", add_special_tokens=False)
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        # The model likes to open more than it closes.
        answer = server.complete(
            **fields, n=4, temperature=1.5, max_tokens=150, seed=3, logit_bias={str(close): 9}
        )
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "stop"
            assert isinstance(json.loads(choice["text"]), dict)


def test_every_choice_of_every_prompt_has_its_form(server: Served) -> None:
    answer = server.complete(
        prompt=["Add 1 and 2.", "Sort:"],
        n=3,
        guided_regex="[a-z]{2}[0-9]",
        temperature=1.5,
        seed=1,
        max_tokens=9,
    )
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 6
    assert all(re.fullmatch("[a-z]{2}[0-9]", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_seeded_answer_is_the_same_again(server: Served) -> None:
    asked = {"guided_regex": "[a-z]{8}", "temperature": 1.5, "seed": 5}
    assert server.complete(**asked)["choices"][0]["text"] == server.complete(**asked)["choices"][0]["text"]


def test_text_is_a_form_that_asks_for_nothing(server: Served) -> None:
    asked = {"temperature": 0, "max_tokens": 8}
    free = server.complete(**asked)["choices"][0]["text"]
    assert server.complete(response_format={"type": "text"}, **asked)["choices"][0]["text"] == free


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "response_format",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
    (
        {"structured_outputs": {"whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
        "not supported",
    ),
    ({"structured_outputs": {"bogus": 1}}, "structured_outputs.bogus", "Unknown"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
        "response_format.json_schema",
        "alone",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"response_format": format_of(SCHEMA) | {"more": 1}}, "response_format.more", "Unknown"),
    ({"response_format": format_of({"not": {}})}, "response_format.json_schema.schema", "not"),
    ({"response_format": format_of([])}, "response_format.json_schema.schema", "object"),  # type: ignore[arg-type]
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": 3}, "guided_json", "object"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_regex": ""}, "guided_regex", "at least 1"),
    ({"guided_choice": []}, "guided_choice", "list of strings"),
    ({"guided_choice": ["a", "a"]}, "guided_choice", "twice"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "list of strings"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "Expected"),
    ({"guided_regex": "a" * 70000}, "guided_regex", "max_grammar_bytes"),
]


@pytest.mark.parametrize(("fields", "param", "named"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_refused_before_anything_is_generated(
    server: Served, fields: dict[str, Any], param: str, named: str, stream: bool
) -> None:
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "a", "stream": stream, **fields})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert named in error["message"]
    assert param in error["message"]


def test_nothing_is_left_behind_by_refusals(server: Served) -> None:
    assert server.metric("twinserve_num_requests_running") == 0
    assert server.metric("twinserve_num_requests_waiting") == 0


def test_the_fields_are_documented_with_examples(server: Served) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        fields = schemas[body]["properties"]
        assert fields["response_format"]["examples"]
        assert fields["structured_outputs"]["examples"]
        assert {"guided_json", "guided_regex", "guided_choice", "guided_grammar"} <= fields.keys()
    assert "schema" in schemas["SchemaFormat"]["properties"]
    assert "json" in schemas["StructuredOutputs"]["properties"]
