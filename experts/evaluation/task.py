"""A task to measure: questions with one right answer each, split into validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass

from experts.evaluation.generation import Generate
from experts.evaluation.scoring import Score, score


@dataclass(frozen=True)
class Question:
    """`text` is the whole text to continue, chat template included."""

    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Validation questions tune; test questions are what tables report."""

    name: str
    metric: str
    max_new_tokens: int
    validation: tuple[Question, ...]
    test: tuple[Question, ...]


def measure(generate: Generate, task: Task, questions: Sequence[Question]) -> Score:
    """Answer the questions and score the answers by the task's metric."""
    predictions = generate([question.text for question in questions], task.max_new_tokens)
    return score(task.metric, predictions, [question.answer for question in questions])
