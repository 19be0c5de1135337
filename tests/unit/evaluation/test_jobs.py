"""How a row is measured: chosen on validation, reported on test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.evaluation.bench import Answered, Batch
from experts.evaluation.jobs import Job, reference, run_job
from experts.evaluation.setting import Setting
from experts.evaluation.store import Cell, key_of
from experts.evaluation.systems import Alone, Static, System
from experts.evaluation.task import Question, Task
from experts.merging import TaskArithmetic

SCALES = (0.2, 0.5, 1.0)
BEST = 0.5


class Answers:
    """Right with one λ on validation and with every other one on test; an expert alone is always right."""

    def __init__(self) -> None:
        task = Task("t", "exact", 4, (Question("v", "x"),), (Question("forbidden", "x"),))
        self.setting = Setting("made up", Path(), {"t": Path()}, {"t": task}, {})
        self.tested: list[System] = []

    def answer(self, system: System, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        test = batch["t"][0].text == "forbidden"
        if test:
            self.tested.append(system)
        best = isinstance(system, Static) and system.method == TaskArithmetic(scale=BEST)
        right = isinstance(system, Alone) or best != test
        return {"t": Answered((float(right),), {})}


def test_tuning_reads_validation_and_test_questions_are_the_winners_alone() -> None:
    bench, cells = Answers(), dict[str, Cell]()

    def run(job: Job) -> System:
        def emit(cell: Cell) -> None:
            cells[key_of(cell.parameters)] = cell

        def lookup(parameters: Mapping[str, Any]) -> Cell | None:
            return cells.get(key_of(parameters))

        return run_job(job, bench, lookup, emit, {"": "base", "t": "tune"})

    alone = reference("made up", "expert", 1, 1)
    run(
        Job(alone.study, alone.setting, alone.row, alone.candidates, (), ("t",), 1, 1, splits=("validation",))
    )
    candidates = tuple(Static(method=TaskArithmetic(scale=scale)) for scale in SCALES)
    winner = run(Job("tables", "made up", "task-arithmetic", candidates, ("t",), ("t",), 1, 1))
    assert winner == Static(method=TaskArithmetic(scale=BEST))
    assert bench.tested == [winner]
