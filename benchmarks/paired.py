"""Runs that follow each other directly, so that a change of the machine's speed hits all of them alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

Run = Callable[[int], T]
"""Called with a number that differs from round to round: prompts are salted with it."""


def alternate(runs: Mapping[str, Run[T]], rounds: int, first: int = 1) -> dict[str, list[T]]:
    """Every run once a round, in turn, backwards in every other round; results by name, in order of rounds."""
    found: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(runs[name](first + number))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    index = max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)
    return ordered[index]
