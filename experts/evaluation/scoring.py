"""Metrics as pure functions of (prediction, reference), each between 0 and 1."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Separates the candidates of a reference for `mentions`.
CANDIDATES = " / "
NUMBER_WORDS = [
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
]


@dataclass(frozen=True)
class Score:
    """Mean of per-item scores, with the standard error of that mean."""

    mean: float
    standard_error: float
    count: int


def exact(prediction: str, reference: str) -> float:
    """1 when the texts are equal but for outer white space."""
    return float(prediction.strip() == reference.strip())


def tokens(prediction: str, reference: str) -> float:
    """1 − error rate of space-separated tokens (phonemes, code words), at least 0.

    The error rate is the edit distance over the reference's length.
    """
    expected = reference.split()
    return max(0.0, 1.0 - edit_distance(prediction.split(), expected) / max(1, len(expected)))


def mentions(prediction: str, reference: str) -> float:
    """1 when the candidate that the prediction mentions first is the right one.

    The reference lists the candidates, the right one first: "aunt / mother".
    Case is ignored, and only whole words count ("grandmother" is not "mother").
    """
    right, *wrong = (_place(candidate, prediction) for candidate in reference.split(CANDIDATES))
    return float(right < min(wrong, default=math.inf))


def number(prediction: str, reference: str) -> float:
    """1 when the first number of the prediction, in digits or words to twelve, is the reference."""
    pattern = r"\d+|\b(?:" + "|".join(NUMBER_WORDS) + r")\b"
    found = re.search(pattern, prediction, re.IGNORECASE)
    if found is None:
        return 0.0
    text = found.group().lower()
    value = int(text) if text.isdigit() else NUMBER_WORDS.index(text)
    return float(value == int(reference))


def _place(word: str, text: str) -> float:
    """Where the word begins in the text, infinity when it is not there."""
    found = re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, re.IGNORECASE)
    return found.start() if found else math.inf


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Levenshtein distance between two token sequences."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Apply a skill's metric, the name of one of the functions above, to all items."""
    functions = {"exact": exact, "tokens": tokens, "mentions": mentions, "number": number}
    if metric not in functions:
        raise ValueError(f"unknown metric {metric!r}; one of {sorted(functions)}")
    values = [functions[metric](p, r) for p, r in zip(predictions, references, strict=True)]
    return summarise(values)


def summarise(values: Sequence[float]) -> Score:
    """Mean and standard error (sample standard deviation over √n)."""
    count = len(values)
    if count == 0:
        raise ValueError("no items to score")
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / max(1, count - 1)
    return Score(mean=mean, standard_error=math.sqrt(variance / count), count=count)
