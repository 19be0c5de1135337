"""Types of single fields: what each accepts, and how its JSON Schema says so."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

REQUEST_ID = r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}"
"""A request's id, in a header or a body."""

_COLDEST = 1e-5
"""vLLM's too: below it a division would give nothing that greedy decoding does not."""

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

_BIASED = 1024
"""Tokens that one request may bias: each of its steps pays for every one."""

_LARGEST_BIAS = 100
"""OpenAI's."""

_BAD_WORDS = 128
"""Bad words of one request: each of its steps looks at every one."""


def _stop(value: Any) -> tuple[str, ...]:
    """A string, or a list of strings; none of them empty."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings")
    if not all(texts):
        raise ValueError("a stop string must not be empty")
    return tuple(texts)


def _token_ids(value: Any) -> tuple[int, ...]:
    """A list of token ids; the vocabulary's end is checked later."""
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("must be a list of token ids, whole numbers from 0")
    return tuple(value)


def _some(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value:
        raise ValueError("must not be empty: no token could be chosen")
    return value


def _bad_words(value: Any) -> tuple[str, ...]:
    """A list of strings, none blank: vLLM bans them at a text's beginning and behind a space."""
    if not isinstance(value, list) or not all(isinstance(word, str) and word.strip() for word in value):
        raise ValueError("must be a list of words, none of them blank")
    if len(value) > _BAD_WORDS:
        raise ValueError(f"has {len(value)} words; at most {_BAD_WORDS} can be forbidden")
    if any(len(word) > 256 for word in value):
        raise ValueError("a word must not be longer than 256 characters")
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    """OpenAI's object of token id → bias; the vocabulary's end is checked later."""
    if not isinstance(value, dict):
        raise ValueError('must be an object of biases, like {"token id": -100}')
    if len(value) > _BIASED:
        raise ValueError(f"has {len(value)} tokens; at most {_BIASED} can be biased")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        # One way to write an id, so that no token is named twice.
        if not _TOKEN_ID.fullmatch(name):
            raise ValueError(f"{name[:64]!r} is not a token id")
        if type(bias) not in (int, float) or not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise ValueError(
                f"the bias of token {name} must be a number from -{_LARGEST_BIAS} to {_LARGEST_BIAS}"
            )
        biases[int(name)] = float(bias)
    return biases


def _temperature(value: float) -> float:
    """0, or large enough to divide logits by."""
    if 0 < value < _COLDEST:
        raise ValueError(f"must be 0, which is greedy, or at least {_COLDEST:g}")
    return value


def _truncation(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1, which keeps what fits, or at least 1")
    return value


_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}

Stop = Annotated[
    tuple[str, ...], PlainValidator(_stop), WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]})
]
TokenIds = Annotated[tuple[int, ...], PlainValidator(_token_ids), WithJsonSchema(_IDS)]
SomeTokenIds = Annotated[
    tuple[int, ...],
    PlainValidator(lambda value: _some(_token_ids(value))),
    WithJsonSchema({**_IDS, "minItems": 1}),
]
BadWords = Annotated[
    tuple[str, ...], PlainValidator(_bad_words), WithJsonSchema({**_STRINGS, "maxItems": _BAD_WORDS})
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -_LARGEST_BIAS, "maximum": _LARGEST_BIAS},
            "maxProperties": _BIASED,
        }
    ),
]
Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)]
Truncation = Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(_truncation)]
RequestId = Annotated[str, StringConstraints(pattern=rf"^{REQUEST_ID}$")]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
