"""Prompts that nobody's expert is for, made of the tokenizer's own words: the background that scores stand out of."""

import random
from typing import Any

from experts.errors import RoutingError

COUNT = 256
"""Prompts that a background is measured on."""
_FEW = 100
_TEMPLATES = (
    "{A}: {b}",
    "{A} {b}",
    "{A} of {b}",
    "{A} for {b}: {c}",
    "{b} in {A}",
    "What is the {a} of {b}?",
    "How is {b} {a}?",
    "Give the {a} of {b}",
    "{A} {b} to {C}",
    "Which {a} is {b}?",
    "{a}",
    "{a} {b} {c}",
    "{A} the {a}: {b}",
    "Where is the {a} in {b}?",
)


def neutral_prompts(tokenizer: Any, count: int = COUNT, seed: int = 0) -> list[str]:
    """`count` short prompts of words drawn from the vocabulary; the same for the same tokenizer and seed.

    Raises:
        RoutingError: the vocabulary holds no lower-case letters.
    """
    pieces = sorted(tokenizer.get_vocab())
    words = [tokenizer.convert_tokens_to_string([piece]).strip() for piece in pieces]
    lower = sorted({word for word in words if word.isalpha() and word.islower()})
    plain = [word for word in lower if len(word) > 3]
    if len(plain) < _FEW:  # a tokenizer of letters: let them make words
        plain = [first + second for first in lower for second in lower]
    if not plain:
        raise RoutingError("the tokenizer's vocabulary holds no letters to make neutral prompts of")
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    made = []
    for index in range(count):
        a, b, c = (draw.choice(plain) for _ in range(3))
        template = _TEMPLATES[index % len(_TEMPLATES)]
        made.append(template.format(a=a, b=b, c=c, A=a.capitalize(), C=c.capitalize()))
    return made
