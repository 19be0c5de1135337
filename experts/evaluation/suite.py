"""Measuring candidates on tasks: tune on validation, report on test."""

from collections.abc import Callable, Sequence
from typing import Literal

from experts.evaluation.generation import Generate
from experts.evaluation.methods import Candidate
from experts.evaluation.scoring import Score
from experts.evaluation.table import MethodRow, method_row
from experts.evaluation.task import Task, measure
from experts.evaluation.weights import PatchedModel

Log = Callable[[str], None]
Part = Literal["validation", "test"]


def scores_of(
    candidate: Candidate,
    tasks: Sequence[Task],
    model: PatchedModel,
    generate: Generate,
    part: Part,
    log: Log,
) -> dict[str, Score]:
    """Score a candidate on one part of every task; the model is left as the bare base."""
    scores: dict[str, Score] = {}
    for place, task in enumerate(tasks):
        if place == 0 or not candidate.shared:
            model.apply(candidate.changes(task.name))
        scores[task.name] = measure(generate, task, getattr(task, part))
        log(f"{candidate.name} ({candidate.note}), {part}: {task.name} {scores[task.name].mean:.3f}")
    model.restore()
    return scores


def tune(
    candidates: Sequence[Candidate],
    tasks: Sequence[Task],
    experts: dict[str, Score],
    model: PatchedModel,
    generate: Generate,
    log: Log,
) -> Candidate:
    """The candidate with the best normalised average on validation, the first of equals."""

    def quality(candidate: Candidate) -> float:
        scores = scores_of(candidate, tasks, model, generate, "validation", log)
        return method_row(candidate.name, candidate.note, 0, scores, experts).average

    qualities = [quality(candidate) for candidate in candidates]
    for candidate, value in zip(candidates, qualities, strict=True):
        log(f"{candidate.name} ({candidate.note}): {value:.1f} normalised on validation")
    return candidates[qualities.index(max(qualities))]


def row_of(
    candidate: Candidate,
    tasks: Sequence[Task],
    experts: dict[str, Score],
    model: PatchedModel,
    generate: Generate,
    log: Log,
) -> MethodRow:
    """The candidate's row of the table, measured on test."""
    scores = scores_of(candidate, tasks, model, generate, "test", log)
    return method_row(candidate.name, candidate.note, candidate.expert_bytes, scores, experts)
