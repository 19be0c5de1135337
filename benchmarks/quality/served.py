"""How good the embedded bundle's answers are as the server's own engine gives them: oracle gates and router.

The yardstick is each expert alone on the same test questions, from the store of `twinserve eval`.

    twinserve eval tables && python -m benchmarks.quality.served
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.alone import EngineAlone
from benchmarks.quality.figures import ROUTED, SMALL, contribute
from benchmarks.report import Figure, show
from experts.bundle import Bundle
from experts.embedded.family import family
from experts.embedded.tasks import family_tasks
from experts.evaluation.jobs import REFERENCE
from experts.evaluation.scoring import Score
from experts.evaluation.store import Store
from experts.evaluation.table import method_row
from experts.evaluation.task import Task, measure
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
from service.serve import runtime_config
from service.settings import Settings

COMMAND = "twinserve eval tables && python -m benchmarks.quality.served"


class Answers:
    """Asks the engine of a bundle as the server does, all questions of a task in one batch stream."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        alone = EngineAlone.of_bundle(bundle, runtime_config(settings).engine)
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
    bundle: Bundle, tasks: Sequence[Task], settings: Settings, log: Console
) -> tuple[dict[str, dict[str, Score]], dict[str, float], float]:
    """Scores by kind of gates and task, the router's accuracy on each task, and the share that it left alone."""
    answers = Answers(bundle, settings)
    accuracy: dict[str, float] = {}
    alone: list[bool] = []
    scores: dict[str, dict[str, Score]] = {"oracle": {}, "router": {}}
    for task in tasks:
        for kind, found in scores.items():
            answers.gates = {task.name: 1.0} if kind == "oracle" else None
            found[task.name] = measure(answers.generate, task, task.test)
            log.print(f"{kind}: {task.name} {100 * found[task.name].mean:.1f} %")
        right = [max(o.scores, key=o.scores.__getitem__) == task.name for o in answers.outcomes]
        accuracy[task.name] = sum(right) / len(right)
        alone += [outcome.abstained for outcome in answers.outcomes]
    return scores, accuracy, sum(alone) / len(alone)


def figures(
    scores: dict[str, dict[str, Score]],
    experts: dict[str, Score],
    accuracy: dict[str, float],
    expert_bytes: int,
    full_bytes: int,
) -> list[Figure]:
    """Normalised means, raw scores, bytes and the router's accuracy."""
    count = min(score.count for found in scores.values() for score in found.values())
    lowest = sorted(accuracy.items(), key=lambda item: item[1])[:3]
    made = [
        Figure(
            "served: bytes an expert / full model", 100 * expert_bytes / full_bytes, "%", "lower", 1, COMMAND, 5, 1,
            f"{expert_bytes / 1e6:.2f} MB of {full_bytes / 1e6:.0f} MB",
        ),
        Figure(
            "served: router accuracy on test questions", 100 * sum(accuracy.values()) / len(accuracy), "%",
            "higher", count * len(accuracy), COMMAND, 97, 99.5,
            "lowest: " + ", ".join(f"{task} {100 * value:.1f}" for task, value in lowest),
        ),
    ]  # fmt: skip
    for kind, found in scores.items():
        row = method_row(f"Twin, {kind}", "", expert_bytes, found, experts)
        note = (
            f"as served, {kind}; standard error {row.average_error:.2f}; {expert_bytes / 1e6:.2f} MB an expert, "
            f"{100 * expert_bytes / full_bytes:.2f} % of the model"
        )
        if kind == "router":
            made.append(ROUTED.figure(row.average, count, COMMAND, note))
            if expert_bytes <= 0.01 * full_bytes:
                made.append(SMALL.figure(row.average, count, COMMAND, note))
        else:
            made.append(
                Figure(
                    "served: normalised mean, oracle gates", row.average, "% of expert", "higher", count, COMMAND,
                    note=note,
                )
            )  # fmt: skip
        for result in row.results:
            made.append(
                Figure(
                    f"served: {result.task}, {kind}", 100 * result.score.mean, "%", "higher", result.score.count,
                    COMMAND, note=f"standard error {100 * result.score.standard_error:.1f}; "
                    f"normalised {result.normalised:.1f} ± {result.normalised_error:.1f}",
                )
            )  # fmt: skip
    return made


def yardstick(store: Store, items: int) -> dict[str, Score]:
    """Each expert alone on so many test questions of its own task."""
    cells = store.cells(study=REFERENCE, setting="embedded", row="expert", split="test", n=items)
    found = {cell.parameters["task"]: cell.score for cell in cells}
    if not found:
        raise SystemExit(f"{store.path} has no experts alone on {items} questions; run: {COMMAND}")
    return found


def main() -> None:
    """Measure what is served and write its figures beside the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--store", type=Path, default=Path(".twinserve/eval/cells.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--int8", action="store_true", help="only what int8 shared weights make of the mean")
    arguments = parser.parse_args()
    experts = yardstick(Store(arguments.store), arguments.items)
    bundle = Bundle.open(arguments.bundle)
    tokenizer = AutoTokenizer.from_pretrained(bundle.shared_path)
    tasks = family_tasks(family(), tokenizer, arguments.work / "downloads", 1, arguments.items)
    settings = Settings(shared_weights="int8" if arguments.int8 else "model")
    scores, accuracy, alone = served(bundle, tasks, settings, Console())
    if arguments.int8:
        rows = {kind: method_row(kind, "", 0, found, experts) for kind, found in scores.items()}
        made = [
            Figure(
                f"served: normalised mean, {kind}, int8 shared weights", row.average, "% of expert", "higher",
                arguments.items, f"{COMMAND} --int8", note=f"standard error {row.average_error:.2f}",
            )
            for kind, row in rows.items()
        ]  # fmt: skip
        made.append(
            Figure(
                "served: false abstention, int8 shared weights", 100 * alone, "%", "lower",
                arguments.items * len(tasks), f"{COMMAND} --int8",
            )
        )  # fmt: skip
        contribute(made, f"{COMMAND} --int8")
        show("quality on int8 shared weights", made)
        return
    size = max(entry.summary.nbytes for entry in bundle.manifest.experts.values())
    made = figures(scores, experts, accuracy, size, bundle.shared.nbytes)
    contribute(made, COMMAND)
    show("quality of the embedded family as served", made)


if __name__ == "__main__":
    main()
