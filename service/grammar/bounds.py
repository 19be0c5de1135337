"""Bounds on a definition that hold before the library sees it.

The library bounds its own work by fuel, but walks from rule to rule by recursion, which no fuel ends: the depth
of a definition is bounded here, to a part of what a compiling thread's stack carries.
"""

import re
from itertools import pairwise
from typing import Any

from service.grammar.faults import DefinitionError

MAX_DEPTH = 4000
"""Nested levels on the longest way through a definition, references followed."""

MAX_RULES = 512
"""Rules of a grammar, and different references of a JSON schema."""

MAX_NESTING = 64
"""Levels of one JSON text, or brackets of one rule."""

_RULE = re.compile(r"^[ \t]*[!?]?[\w-]+[^\S\n]*(?:\[[^\]\n]*\])?[^\S\n]*(?:\.-?\d+)?[^\S\n]*:", re.MULTILINE)

_REFERENCE = re.compile(r'"\$ref"\s*:\s*"([^"]*)"')


def check_bytes(text: str, limit: int) -> None:
    """Raise DefinitionError for a definition that is no text, or longer than the limit."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise DefinitionError("holds half of a surrogate pair, which is JSON but not text") from error
    if size > limit:
        raise DefinitionError(f"has {size} bytes; the limit is {limit} (max_grammar_bytes)", limit=True)


def check_schema(schema: Any) -> None:
    """Raise DefinitionError for a JSON schema that nests too deeply, references followed."""
    references: set[str] = set()
    deepest = 0
    level = [schema]
    while level:
        deepest += 1
        if deepest > MAX_NESTING:
            raise DefinitionError(f"nests deeper than {MAX_NESTING} levels; use $defs and $ref", limit=True)
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                if isinstance(node.get("$ref"), str):
                    references.add(node["$ref"])
                inner += node.values()
            elif isinstance(node, list):
                inner += node
        level = inner
    _check_count(len(references), "different references ($ref)")
    _check_depth(deepest * (1 + len(references)))


def check_rules(text: str) -> None:
    """Raise DefinitionError for a grammar of too many rules, or of rules that nest too deeply when put together."""
    starts = [0, *(match.start() for match in _RULE.finditer(text)), len(text)]
    _check_count(len(starts) - 2, "rules")
    depths = [_depth(text[begin:end]) for begin, end in pairwise(starts)]
    _check_depth(sum(depths) + len(starts))


def _check_count(count: int, what: str) -> None:
    if count > MAX_RULES:
        raise DefinitionError(f"has {count} {what}; the limit is {MAX_RULES}", limit=True)


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise DefinitionError(
            f"nests up to {depth} levels through its rules and references; the limit is {MAX_DEPTH}",
            limit=True,
        )


def _depth(rule: str) -> int:
    """Deepest bracket of one rule, as often as an embedded schema could go there by its own references.

    Brackets in quotes count too: an estimate from above.
    """
    depth = deepest = 0
    for character in rule:
        if character in "([{~":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest * (1 + len(set(_REFERENCE.findall(rule))))
