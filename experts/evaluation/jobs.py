"""A row of a study: candidates of one system, the best of them on validation, its scores on test.

Test questions are read for the winner alone. Knows neither processes nor files.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from experts.errors import EvaluationError
from experts.evaluation.bench import Answered, Batch
from experts.evaluation.setting import Setting
from experts.evaluation.store import Cell, Parameters
from experts.evaluation.systems import Adapter, Alone, Base, System
from experts.evaluation.task import Task

Split = Literal["validation", "test"]
REFERENCE = "reference"
"""The study of base and experts alone, which the others divide by."""


class Answerer(Protocol):
    """What a job needs of a `Bench`."""

    @property
    def setting(self) -> Setting:
        """What is measured on."""

    def answer(self, system: System, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        """Score the questions of each task."""


Lookup = Callable[[Parameters], Cell | None]
Emit = Callable[[Cell], None]


@dataclass(frozen=True)
class Job:
    """One row, for one set of experts and one seed.

    Attributes:
        study, setting, row: where it belongs in the tables.
        candidates: systems to choose from on validation; a single one is not tuned.
        experts: those that are merged or routed among.
        tasks: measured on test.
        items, validation: questions of each task and split, at most.
        seed: which draw of experts it is, and the seed of random methods.
        splits: what is measured of the winner.
    """

    study: str
    setting: str
    row: str
    candidates: tuple[System, ...]
    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int
    validation: int
    seed: int = 0
    splits: tuple[Split, ...] = ("test",)

    @property
    def cost(self) -> int:
        """Items that it may have to answer, for progress."""
        tuned = len(self.candidates) * len(self.experts) * self.validation if len(self.candidates) > 1 else 0
        sizes = {"test": self.items, "validation": self.validation}
        return tuned + sum(sizes[split] for split in self.splits) * len(self.tasks)


def run_job(job: Job, bench: Answerer, lookup: Lookup, emit: Emit, digests: Mapping[str, str]) -> System:
    """Measure what is missing; gives the winner.

    Args:
        job: the row.
        bench: answers on the job's setting.
        lookup: cells that are there.
        emit: takes each new cell.
        digests: of the weights, see `Setting.digests`.
    """
    _require_known(job, bench.setting)
    winner = job.candidates[0]
    if len(job.candidates) > 1:
        qualities = [_quality(job, system, bench, lookup, emit, digests) for system in job.candidates]
        winner = job.candidates[qualities.index(max(qualities))]
    for split in job.splits:
        _measure(job, winner, job.tasks, split, bench, lookup, emit, digests)
    return winner


def parameters(
    job: Job, system: System, task: Task, split: Split, count: int, digests: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that decides a cell's scores: `count` questions of a split of a task, and what answers them."""
    match system:
        case Base():
            used: Sequence[str] = ()
        case Alone():
            used = (task.name,)
        case Adapter():
            used = (system.name,)
        case _:
            used = job.experts
    return {
        "study": job.study,
        "setting": job.setting,
        "base": digests[""],
        "row": job.row,
        "system": system.model_dump(mode="json", exclude_none=True),
        "experts": {name: digests[name] for name in used},
        "seed": job.seed,
        "task": task.name,
        "split": split,
        "n": count,
        "questions": _digest(task, split, count),
    }


def _digest(task: Task, split: Split, count: int) -> str:
    """Of the questions, their answers and how they are scored."""
    asked = [[question.text, question.answer] for question in getattr(task, split)[:count]]
    about = json.dumps([task.metric, task.max_new_tokens, asked])
    return hashlib.sha256(about.encode()).hexdigest()[:10]


def reference(setting: str, kind: Literal["base", "expert"], items: int, validation: int) -> Job:
    """The job whose cells others divide by; its `tasks` are to be filled in."""
    system: System = Base() if kind == "base" else Alone()
    return Job(REFERENCE, setting, kind, (system,), (), (), items, validation)


def _quality(
    job: Job, system: System, bench: Answerer, lookup: Lookup, emit: Emit, digests: Mapping[str, str]
) -> float:
    """Mean over the experts' tasks of the validation score, each divided by its expert's own."""
    cells = _measure(job, system, job.experts, "validation", bench, lookup, emit, digests)
    yardstick = reference(job.setting, "expert", job.items, job.validation)
    found = []
    for name, cell in cells.items():
        task = bench.setting.tasks[name]
        own = lookup(parameters(yardstick, Alone(), task, "validation", cell.score.count, digests))
        if own is None:
            raise EvaluationError(
                f"{task}: its expert alone is not measured on validation; run the reference"
            )
        if own.score.mean > 0:
            found.append(cell.score.mean / own.score.mean)
    return sum(found) / max(1, len(found))


def _measure(
    job: Job,
    system: System,
    tasks: Sequence[str],
    split: Split,
    bench: Answerer,
    lookup: Lookup,
    emit: Emit,
    digests: Mapping[str, str],
) -> dict[str, Cell]:
    """Cells of one system on one split, made where they are missing; without tasks that it cannot answer."""
    limit = job.items if split == "test" else job.validation
    questions = {task: getattr(bench.setting.tasks[task], split)[:limit] for task in tasks}
    keys = {
        task: parameters(job, system, bench.setting.tasks[task], split, len(asked), digests)
        for task, asked in questions.items()
    }
    found = {task: cell for task, key in keys.items() if (cell := lookup(key)) is not None}
    missing = {task: asked for task, asked in questions.items() if task not in found}
    if missing:
        started, clock = time.process_time(), time.perf_counter()
        answered = bench.answer(system, job.experts, missing)
        took = {"cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - clock}
        for task, result in answered.items():
            facts = {**result.facts, **{name: round(value / len(missing), 3) for name, value in took.items()}}
            found[task] = Cell(keys[task], result.scores, facts)
            emit(found[task])
    return {task: found[task] for task in tasks if task in found}


def _require_known(job: Job, setting: Setting) -> None:
    missing = [name for name in job.experts if name not in setting.experts]
    unknown = [name for name in job.tasks if name not in setting.tasks]
    if missing or unknown:
        raise EvaluationError(
            f"{job.study}, {job.row}: {setting.name} has no expert {missing} or no task {unknown}; "
            "train them or leave them out"
        )
