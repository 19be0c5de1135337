"""A method on all tasks, raw and normalised by each task's own expert."""

from dataclasses import dataclass

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
