"""Constraint → the library's grammar text, with everything refused that it would ignore."""

import json
import re
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, regex_to_lark

from service.core import Constraint
from service.grammar.bounds import check_rules, check_schema
from service.grammar.faults import DefinitionError, shortened
from service.grammar.gbnf import is_gbnf, lark_of

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a name of its stub alone

_WHITESPACE: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n\r\t]{1,20}"}
"""Between the parts of JSON. Unbounded, a model can write nothing else until its tokens are used up."""

_NOTHING_IGNORED: "JsonCompileOptions" = {"lenient": False}

_WITHOUT_EFFECT = re.compile(r"^[ \t]*[!?]?\w+[ \t]*\[[^\]\n]*\btemperature\b", re.MULTILINE)
_DIALECTS = re.compile(r"https?://json-schema\.org/[a-z0-9/-]+schema#?\Z")


def definition(constraint: Constraint) -> str:
    """What the library compiles.

    Raises:
        DefinitionError: malformed, beyond a bound, or asking for what would be ignored.
    """
    text = constraint.text
    if constraint.kind == "json_object":
        return _json({"type": "object"})
    if constraint.kind == "json_schema":
        return _json(_parsed(text))
    if constraint.kind == "regex":
        return _regex(text)
    if constraint.kind == "choice":
        choices = (json.dumps(choice, ensure_ascii=False) for choice in _parsed(text))
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(choices)))
    lark = lark_of(text) if is_gbnf(text) else text
    if _WITHOUT_EFFECT.search(lark):
        raise DefinitionError(
            "a rule sets a temperature, which has no effect here; send the temperature of the request"
        )
    check_rules(lark)
    return str(LLMatcher.grammar_from_lark(lark))


def _regex(text: str) -> str:
    """As in JSON Schema's patterns, the classes of digits and of word characters are ASCII."""
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise DefinitionError("ends within an escape")  # the library would drop it
    return str(LLMatcher.grammar_from_regex(regex_to_lark(text, "dw")))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DefinitionError(f"is not JSON: {error}") from error


def _json(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise DefinitionError("must be an object")
    check_schema(schema)
    # The library would look for a dialect that it does not know, and name the wrong field.
    dialect = schema.get("$schema", "")
    if dialect != "" and not (isinstance(dialect, str) and _DIALECTS.match(dialect)):
        raise DefinitionError("'$schema' names no dialect of json-schema.org; leave it out")
    guidance = schema.get("x-guidance")
    spaced = not isinstance(guidance, dict) or guidance.get("whitespace_flexible") is not False
    try:
        defaults = _WHITESPACE if spaced else None
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults, _NOTHING_IGNORED))
    except ValueError as error:
        raise DefinitionError(f"is no JSON schema that can be read: {shortened(str(error))}") from error
