"""How good the embedded family's answers are: static merges, experts, and Twin as it is served.

The methods on plain weights come from `twinserve embedded evaluate` (its file is read here); this adds what
the server's own engine answers, with gates named by an oracle and with gates set by the router, on the same
test questions, and writes the figures.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.alone import EngineAlone
from benchmarks.report import Figure, show, write
from experts.bundle import Bundle
from experts.embedded.family import family
from experts.embedded.tasks import family_tasks
from experts.evaluation.comparison import served_row
from experts.evaluation.scoring import Score
from experts.evaluation.table import MethodRow, Table
from experts.evaluation.task import Task
from service.core import (
    Failed,
    Finished,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
    SamplingParams,
    TextDelta,
)
from service.engine.roster import StepResult

COMMAND = "twinserve embedded evaluate && python -m benchmarks.quality"
STATIC = ("averaging", "task-arithmetic", "ties", "dare-ties")


class Answers:
    """Asks the engine of a bundle as the server does, all questions of a task in one batch stream."""

    def __init__(self, bundle: Bundle) -> None:
        alone = EngineAlone.of_bundle(bundle)
        self._engine, self._tokenizer = alone.engine, alone.tokenizer.backend_tokenizer
        self.gates: dict[str, float] | None = None
        self.outcomes: list[RoutingOutcome] = []

    def generate(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers; `outcomes` then holds how each was routed."""
        answers = [""] * len(texts)
        outcomes: dict[int, RoutingOutcome] = {}
        for index, text in enumerate(texts):
            request = GenerationRequest(
                str(index),
                tuple(self._tokenizer.encode(text, add_special_tokens=False).ids),
                SamplingParams(max_tokens=max_new_tokens, temperature=0.0),
                RoutingChoice(gates=self.gates),
            )
            fixed = self._engine.dispatcher.fixed(request.routing) if self.gates is not None else None
            self._engine.add(request, fixed, time.monotonic(), StepResult())
        while self._engine.busy:
            for request_id, event in self._engine.step().events:
                if isinstance(event, TextDelta):
                    answers[int(request_id)] += event.text
                elif isinstance(event, Finished) and event.routing is not None:
                    outcomes[int(request_id)] = event.routing
                elif isinstance(event, Failed):
                    raise event.error
        self.outcomes = [outcomes[index] for index in range(len(texts))]
        return answers


def served(
    bundle: Bundle, tasks: Sequence[Task], experts: dict[str, Score], log: Console
) -> tuple[list[MethodRow], dict[str, float]]:
    """Rows of the engine with oracle gates and with the router, and the router's accuracy on each task."""
    answers = Answers(bundle)
    sizes = [entry.summary.nbytes for entry in bundle.manifest.experts.values()]
    accuracy: dict[str, float] = {}
    parts: dict[str, list[MethodRow]] = {"oracle": [], "router": []}
    for task in tasks:
        for kind, rows in parts.items():
            answers.gates = {task.name: 1.0} if kind == "oracle" else None
            note = "served: the true task's expert" if kind == "oracle" else "served: unknown task"
            rows.append(served_row(f"Twin, {kind}", note, max(sizes), [task], experts, answers.generate))
            log.print(f"{rows[-1].method}: {task.name} {rows[-1].average:.1f} normalised")
        right = [max(o.scores, key=o.scores.__getitem__) == task.name for o in answers.outcomes]
        accuracy[task.name] = sum(right) / len(right)
    return [_joined(rows) for rows in parts.values()], accuracy


def figures(table: Table, accuracy: dict[str, float], full_bytes: int) -> list[Figure]:
    """Every row of the table, and the bounds that the family must meet."""
    count = min(result.score.count for row in table.rows for result in row.results)
    rows = {row.method: row for row in table.rows}
    best = max((rows[name] for name in STATIC if name in rows), key=lambda row: row.average)
    router = rows["Twin, router"]
    found = [
        Figure(
            "normalised mean: Twin with router", router.average, "% of expert", "higher", count, COMMAND, 95, 99.5,
            f"standard error {router.average_error:.1f}",
        ),
        Figure(
            "bytes an expert / full model", 100 * router.expert_bytes / full_bytes, "%", "lower", 1, COMMAND, 5, 1,
            f"{router.expert_bytes / 1e6:.2f} MB of {full_bytes / 1e6:.0f} MB",
        ),
        Figure(
            "router accuracy on test questions", 100 * sum(accuracy.values()) / len(accuracy), "%", "higher",
            count * len(accuracy), COMMAND, 97, 99.5,
            "lowest: " + ", ".join(f"{t} {100 * a:.1f}" for t, a in sorted(accuracy.items(), key=lambda i: i[1])[:3]),
        ),
        Figure(
            "normalised mean: best static merge", best.average, "% of expert", "lower", count, COMMAND, 85, None,
            f"{best.method} ({best.note}); the family must conflict, so lower is the condition",
        ),
    ]  # fmt: skip
    for row in table.rows:
        found.append(
            Figure(
                f"normalised mean: {row.method}", row.average, "% of expert", "higher", count, COMMAND,
                note=f"{row.note}; standard error {row.average_error:.2f}; {row.expert_bytes / 1e6:.2f} MB an expert",
            )
        )  # fmt: skip
        for result in row.results:
            found.append(
                Figure(
                    f"raw {result.task}: {row.method}", 100 * result.score.mean, "%", "higher", result.score.count,
                    COMMAND, note=f"standard error {100 * result.score.standard_error:.1f}; "
                    f"normalised {result.normalised:.1f} ± {result.normalised_error:.1f}",
                )
            )  # fmt: skip
    return found


def _joined(rows: Sequence[MethodRow]) -> MethodRow:
    first = rows[0]
    results = tuple(result for row in rows for result in row.results)
    return MethodRow(first.method, first.note, first.expert_bytes, results)


def main() -> None:
    """Measure what is served, join it with the plain methods, write figures and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--methods", type=Path, default=Path("build/embedded/methods.json"))
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--test", type=int, default=200)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    plain = TypeAdapter(Table).validate_json(arguments.methods.read_text(encoding="utf-8"))
    alone = next(row for row in plain.rows if row.method == "expert alone")
    tokenizer = AutoTokenizer.from_pretrained(bundle.shared_path)
    tasks = family_tasks(family(), tokenizer, arguments.work / "downloads", 1, arguments.test)
    experts = {result.task: result.score for result in alone.results}
    rows, accuracy = served(bundle, tasks, experts, Console())
    table = Table(plain.tasks, (*plain.rows, *rows))
    (arguments.out / "quality.md").write_text(table.to_markdown(), encoding="utf-8")
    result = figures(table, accuracy, bundle.shared.nbytes)
    write(arguments.out / "quality.json", result)
    show("quality of the embedded family", result[: 4 + len(table.rows)])


if __name__ == "__main__":
    main()
