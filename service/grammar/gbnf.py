"""llama.cpp's grammars (GBNF) in Lark, by the library's own converter and what it needs before."""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from service.grammar.bounds import MAX_NESTING
from service.grammar.faults import DefinitionError, shortened

_RULE = re.compile(r"^[ \t]*([A-Za-z0-9_-]+)[ \t]*::=", re.MULTILINE)
_ESCAPE = re.compile(r"(\\\\)|\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")

_MAX_RULES = 256
_MAX_BYTES = 16384
"""The converter is plain Python, whose time grows with rules times length."""


def is_gbnf(text: str) -> bool:
    """The text defines rules by `::=`, which Lark never does."""
    return _RULE.search(text) is not None


def lark_of(text: str) -> str:
    """The same grammar in Lark.

    Raises:
        DefinitionError: it is malformed or too large.
    """
    names = _RULE.findall(text)
    size = len(text.encode())
    if len(names) > _MAX_RULES or size > _MAX_BYTES:
        raise DefinitionError(
            f"has {len(names)} rules and {size} bytes; in GBNF the limits are {_MAX_RULES} and {_MAX_BYTES}",
            limit=True,
        )
    for name in names:
        # The later one would silently replace the earlier one.
        if names.count(name) > 1:
            raise DefinitionError(f"the rule {name!r} is defined twice")
    try:
        return gbnf_to_lark(_ESCAPE.sub(_as_character, text))
    except RecursionError as error:
        raise DefinitionError(f"nests too deeply; stay below {MAX_NESTING} levels", limit=True) from error
    except Exception as error:
        # The converter raises bare exceptions for whatever it cannot read.
        raise DefinitionError(f"is no GBNF grammar that can be read: {shortened(str(error))}") from error


def _as_character(match: re.Match[str]) -> str:
    """An escape as the character itself where Lark reads the escape differently."""
    backslash, *codes = match.groups()
    if backslash:
        return str(match[0])
    point = int(next(code for code in codes if code), 16)
    if point < 0x80:
        return f"\\x{point:02x}"
    if 0xD800 <= point < 0xE000 or point > 0x10FFFF:
        raise DefinitionError(f"{match[0]} is no character")
    return chr(point)
