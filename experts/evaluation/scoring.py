"""Metrics as pure functions of (prediction, reference), each between 0 and 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Levenshtein distance between two token sequences."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Apply a skill's metric, `exact` or `tokens`, to all items."""
    functions = {"exact": exact, "tokens": tokens}
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
