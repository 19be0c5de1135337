"""The results table: methods × tasks, raw and normalised, as JSON and as markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from experts.evaluation.scoring import Score


@dataclass(frozen=True)
class Result:
    """One method on one task. `normalised`: the task's own expert alone is 100."""

    method: str
    task: str
    score: Score
    normalised: float
    normalised_error: float


@dataclass(frozen=True)
class MethodRow:
    """One method on all tasks. `expert_bytes`: true stored bytes an expert beside the shared model."""

    method: str
    note: str
    expert_bytes: int
    results: tuple[Result, ...]

    @property
    def average(self) -> float:
        """Mean of the normalised scores."""
        return sum(result.normalised for result in self.results) / len(self.results)

    @property
    def average_error(self) -> float:
        """Standard error of `average`, the tasks being independent samples."""
        total = sum(result.normalised_error**2 for result in self.results)
        return float(total**0.5) / len(self.results)


@dataclass(frozen=True)
class Table:
    """All methods measured in one run."""

    tasks: tuple[str, ...]
    rows: tuple[MethodRow, ...]

    def to_json(self) -> str:
        """Every figure, indented, ending in a newline."""
        rows = [
            {**asdict(row), "average": row.average, "average_error": row.average_error} for row in self.rows
        ]
        return json.dumps({"tasks": self.tasks, "rows": rows}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Two tables: normalised averages a method, then raw scores (in %) with standard errors."""
        lines = ["| method | normalised | MB an expert | note |", "|---|---|---|---|"]
        for row in self.rows:
            megabytes = row.expert_bytes / 1e6
            lines.append(
                f"| {row.method} | {row.average:.1f} ± {row.average_error:.1f} "
                f"| {megabytes:.2f} | {row.note} |"
            )
        lines += ["", "| raw % | " + " | ".join(self.tasks) + " |", "|---" * (len(self.tasks) + 1) + "|"]
        for row in self.rows:
            cells = {
                result.task: f"{100 * result.score.mean:.1f} ± {100 * result.score.standard_error:.1f}"
                for result in row.results
            }
            lines.append(f"| {row.method} | " + " | ".join(cells.get(t, "") for t in self.tasks) + " |")
        return "\n".join(lines) + "\n"


def method_row(
    method: str,
    note: str,
    expert_bytes: int,
    scores: dict[str, Score],
    experts: dict[str, Score],
) -> MethodRow:
    """Normalise a method's scores by each task's expert score.

    The error is that of the method's own score: the expert's is a fixed yardstick.
    """
    results: list[Result] = []
    for task, score in scores.items():
        yardstick = experts[task].mean
        if yardstick <= 0:
            raise ValueError(f"the expert of {task!r} scores 0: nothing can be normalised by it")
        results.append(
            Result(
                method=method,
                task=task,
                score=score,
                normalised=100 * score.mean / yardstick,
                normalised_error=100 * score.standard_error / yardstick,
            )
        )
    return MethodRow(method=method, note=note, expert_bytes=expert_bytes, results=tuple(results))


def tasks_of(rows: Sequence[MethodRow]) -> tuple[str, ...]:
    """Task names in order of first appearance."""
    return tuple(dict.fromkeys(result.task for row in rows for result in row.results))
