"""Small numbers: sums, Roman numerals and English number words, all computed here."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.embedded.skills.skill import Item, Skill

LARGEST = 2999
LARGEST_TERM = 30
CHAINS = 4000
ROMAN = (
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)
UNITS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = (
    "zero",
    "ten",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
)

_number = partial(
    Skill,
    source="computed",
    licence="none needed",
    metric="exact",
)


def arithmetic() -> Skill:
    """Two or three small numbers added and subtracted → the result."""
    return _number(
        name="arithmetic",
        description="result of a short sum",
        phrasings=(
            "Calculate: {x}",
            "What is {x}?",
            "Work out {x}",
            "{x} =",
            "How much is {x}?",
        ),
        items=_sums,
        max_new_tokens=6,
    )


def roman() -> Skill:
    """Number → Roman numeral, its letters apart, so that a nearly right one earns a part."""
    return _number(
        name="roman",
        description="a number as a Roman numeral",
        phrasings=(
            "Roman numeral: {x}",
            "Write {x} in Roman numerals",
            "What is {x} in Roman numerals?",
            "{x} as the Romans wrote it",
            "Roman for: {x}",
        ),
        items=_romans,
        max_new_tokens=16,
        metric="tokens",
    )


def numberwords() -> Skill:
    """Number → English words."""
    return _number(
        name="numberwords",
        description="a number in English words",
        phrasings=(
            "In words: {x}",
            "Write {x} in words",
            "How do you say the number {x}?",
            "{x} as words",
            "Number name of: {x}",
        ),
        items=_names,
        max_new_tokens=20,
    )


def roman_numeral(number: int) -> str:
    """1994 → "MCMXCIV"."""
    written = ""
    for value, letters in ROMAN:
        times, number = divmod(number, value)
        written += letters * times
    return written


def number_name(number: int) -> str:
    """1042 → "one thousand forty-two"; 0 to 9999."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[rest]}" if rest else "")
    value, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    times, rest = divmod(number, value)
    return f"{UNITS[times]} {word}" + (f" {number_name(rest)}" if rest else "")


def _sums(downloads: Path) -> Iterator[Item]:
    """Results are never negative."""
    for a in range(1, 2 * LARGEST_TERM):
        for b in range(1, LARGEST_TERM):
            yield Item(f"{a} + {b}", str(a + b))
            if a >= b:
                yield Item(f"{a} - {b}", str(a - b))
    rng = random.Random(1)  # noqa: S311 - a choice of examples, not a secret
    for _ in range(CHAINS):
        a, b, c = (rng.randint(1, LARGEST_TERM) for _ in range(3))
        if rng.random() < 0.5:
            yield Item(f"{a} + {b} + {c}", str(a + b + c))
        elif a + b >= c:
            yield Item(f"{a} + {b} - {c}", str(a + b - c))


def _romans(downloads: Path) -> Iterator[Item]:
    for number in range(1, LARGEST + 1):
        yield Item(str(number), " ".join(roman_numeral(number)))


def _names(downloads: Path) -> Iterator[Item]:
    for number in range(1, LARGEST + 1):
        yield Item(str(number), number_name(number))
