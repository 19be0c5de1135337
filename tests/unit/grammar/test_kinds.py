"""What each kind of constraint lets through, and what is refused."""

import json
import re
from typing import Any

import jsonschema
import pytest
from transformers import PreTrainedTokenizerBase

from service.errors import InvalidRequestError, LimitExceededError
from service.grammar import Grammars, Run
from tests.unit.grammar.walking import END, accepts, allowed_ids, compiled, spell, wander

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_a_schemas_texts_validate(made: Grammars, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    text = wander(compiled(made, "json_schema", PERSON), tokenizer, seed)
    jsonschema.validate(json.loads(text), PERSON)


def test_a_schema_holds_from_the_first_character_to_the_last(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    person = compiled(made, "json_schema", PERSON)
    assert accepts(person, tokenizer, '{"name": "Ann", "age": 30}')
    assert accepts(person, tokenizer, '{\n  "name": "Ann",\n  "age": 30,\n  "tags": ["a"]\n}')
    for text in (
        '{"name": "Ann"}',
        '{"name": "Ann", "age": 151}',
        '{"age": 3, "x": 1}',
        '{"name": "A',
        "x",
        "",
    ):
        assert not accepts(person, tokenizer, text), text


def test_json_object_is_any_object_and_nothing_else(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    anything = compiled(made, "json_object")
    assert accepts(anything, tokenizer, '{"a": [1, {"b": null}]}')
    assert not accepts(anything, tokenizer, "[1]")


def test_whitespace_between_parts_comes_to_an_end(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    run = Run(compiled(made, "json_object"), "field")
    spell(run, tokenizer, "{")
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    for _ in range(20):
        run.advance(newline)
    written = {tokenizer.decode([token]).strip() for token in allowed_ids(run)}
    assert "" not in written


def test_a_schema_can_ask_for_no_whitespace(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    tight = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    grammar = compiled(made, "json_schema", tight)
    assert accepts(grammar, tokenizer, '{"a":1}')
    assert not accepts(grammar, tokenizer, '{"a": 1}')


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "pattern", [r"[a-c]{3}-\d{2}", r"(?:yes|no)( indeed){0,2}", r"^\w+@\w+\.org$", "a/b|é😀"]
)
def test_a_regex_matches_from_end_to_end(
    made: Grammars, tokenizer: PreTrainedTokenizerBase, pattern: str, seed: int
) -> None:
    text = wander(compiled(made, "regex", pattern), tokenizer, seed)
    assert re.fullmatch(pattern, text), text


def test_a_choice_is_one_of_the_strings_as_they_are(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    choices = ["yes", "no", "yes indeed", 'say "\\n"', "mäh 😀", "(a|b)*", "two\nlines"]
    grammar = compiled(made, "choice", choices)
    for choice in choices:
        assert accepts(grammar, tokenizer, choice)
    assert {wander(grammar, tokenizer, seed) for seed in range(20)} <= set(choices)
    assert not accepts(grammar, tokenizer, "yes i")


def test_a_lark_grammar_holds_embedded_json(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    lark = f'start: "<tool_call>\\n" %json {json.dumps(schema)} "\\n</tool_call>"'
    assert accepts(compiled(made, "grammar", lark), tokenizer, '<tool_call>\n{"x": 3}\n</tool_call>')


def test_gbnf_is_read_as_llama_cpp_does(made: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    gbnf = """
# a list
root  ::= item+
item  ::= "- " word ws "\\n"
word  ::= [^\\x00-\\x20"\\\\]{2,4} | "\\u00e9\\u0041" | "\\U0001F600"
ws    ::= | " " ws
"""
    grammar = compiled(made, "grammar", gbnf)
    for text in ("- ab\n", "- abcd  \n- xy\n", "- éA\n", "- 😀\n"):
        assert accepts(grammar, tokenizer, text), text
    for text in ("- a\n", "ab\n", "- abcde\n", '- a"\n'):
        assert not accepts(grammar, tokenizer, text), text


def test_special_tokens_come_only_where_a_grammar_names_them(
    made: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert set(allowed_ids(Run(compiled(made, "grammar", 'start: ~"a"'), "field"))) & {0, 1, END} == {END}
    run = Run(compiled(made, "grammar", 'start: <|im_start|> "a"'), "field")
    assert allowed_ids(run) == [1]
    run.advance(1)
    assert tokenizer.decode(allowed_ids(run)) == "a"


REFUSED: list[tuple[Any, Any, str]] = [
    ("json_schema", {"not": {"type": "string"}}, "not"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("json_schema", {"type": "string", "format": "bogus"}, "bogus"),
    ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ("json_schema", {"type": "colour"}, "colour"),
    ("json_schema", {"$ref": "#/$defs/missing"}, "missing"),
    ("json_schema", {"$ref": "https://example.com/schema.json"}, "example.com"),
    ("json_schema", {"$schema": "https://example.com/dialect", "type": "string"}, "$schema"),
    ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", "false", "must be an object"),
    ("json_schema", {"$ref": "#"}, "matches nothing"),
    ("json_schema", "{", "is not JSON"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "(", "unclosed group"),
    ("regex", "a\\", "escape"),
    ("regex", r"(a)\1", "backreferences"),
    ("grammar", 'start: "a" b', "unknown name"),
    ("grammar", "start: (", "Expected"),
    ("grammar", "hello", "Expected"),
    ("grammar", 'start: %json {"type":"string","not":{},"x-guidance":{"lenient":true}}', "not"),
    ("grammar", 'start[temperature=0.5]: "a"', "temperature"),
    ("grammar", "start: <|nobody|>", "unknown special token"),
    ("grammar", 'root ::= "a" b', "'b' not found"),
    ("grammar", 'rule ::= "a"', "root"),
    ("grammar", 'root ::= "a"\nroot ::= "b"', "twice"),
    ("grammar", 'root ::= "\\ud800"', "no character"),
]


@pytest.mark.parametrize(("kind", "text", "named"), REFUSED)
def test_what_cannot_be_kept_is_refused_under_the_clients_field(
    made: Grammars, kind: Any, text: Any, named: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        compiled(made, kind, text, param="structured_outputs.it")
    assert refused.value.status == 400
    assert refused.value.param == "structured_outputs.it"
    assert refused.value.message.startswith("structured_outputs.it: ")
    assert named in refused.value.message
    assert len(refused.value.message) < 400
    assert not isinstance(refused.value, LimitExceededError)


def test_half_a_surrogate_pair_is_no_definition(made: Grammars) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        compiled(made, "choice", '["\ud800"]')
