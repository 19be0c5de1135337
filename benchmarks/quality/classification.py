"""Encoder classification with unknown task and unknown head, as Twin-Merging's RoBERTa part: MiniLM, eight tasks.

    python -m benchmarks.quality.classification

Needs trained classifiers (`twinserve classifier train`). Every answer of Twin comes from the server's own
classifier model. Normalised: accuracy over that of the task's own classifier alone, mean over tasks. An answer
counts if it is from the right label set and right in it, so a text that is routed astray is wrong even where two
label sets share a word. Hyper-parameters are chosen on validation texts. Done cells are kept in the work folder.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from benchmarks import report
from benchmarks.report import Figure
from experts.checkpoint import write_checkpoint
from experts.classification.base import find_base
from experts.classification.build import build_classifier
from experts.classification.bundle import ClassifierBundle
from experts.classification.checkpoints import ClassifierFineTune, save_encoder
from experts.classification.cli import BUNDLE, CLASSIFIERS, WORK
from experts.classification.families import family_of, head_inputs, head_logits
from experts.classification.features import pad
from experts.classification.suite_plan import FEATURES, MAX_TEXTS, RANK, suite_plan
from experts.classification.task import ClassificationTask
from experts.classification.tasks.suite import suite
from experts.classification.train import RECORD_NAME
from experts.embedded.skills.skill import Split
from experts.merging import merge
from experts.merging.methods import Averaging, MergeMethod, TaskArithmetic, Ties
from experts.routing.loading import load_tokenizer
from service.classify import Classified, Text
from service.classify.model import ClassifierModel
from service.core import RoutingChoice

COMMAND = "python -m benchmarks.quality.classification"
RESULTS = Path("benchmarks/results")
SCALES = (0.1, 0.2, 0.3, 0.5)
TIES_SCALES = (0.5, 1.0, 1.5)
TWIN_SCALES = (0.1, 0.3)
MAX_TOKENS = 64
BATCH = 32

Correct = Mapping[str, Sequence[int]]
"""Task → 1 or 0 for every text."""


@dataclass(frozen=True)
class Question:
    """One text: token ids and the right label's index in the task's set."""

    ids: tuple[int, ...]
    label: int


Questions = Mapping[str, Sequence[Question]]


class Cells:
    """Results of finished parts, so that a killed run goes on where it was."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The cell's JSON value, computed if it is not there."""
        path = self._folder / f"{name}.json"
        if not path.is_file():
            print(f"{name} …", flush=True)
            path.write_text(json.dumps(compute()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))


def questions(tasks: Sequence[ClassificationTask], downloads: Path, split: Split, limit: int) -> Questions:
    """So many texts of a split of every task, tokenised as the base does."""
    tokenizer = load_tokenizer(find_base())
    made = {}
    for task in tasks:
        examples = task.load(split, downloads)[:limit]
        ids = tokenizer([example.text for example in examples], truncation=True, max_length=MAX_TOKENS)[
            "input_ids"
        ]
        made[task.name] = [
            Question(tuple(tokens), example.label) for tokens, example in zip(ids, examples, strict=True)
        ]
    return made


def batches(asked: Sequence[Question]) -> list[list[int]]:
    """Indices of texts of like length."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].ids))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


@torch.inference_mode()
def oracle_head(
    encoder: Any, config: Mapping[str, Any], head: Mapping[str, Tensor], asked: Sequence[Question]
) -> list[int]:
    """1 where the head over an encoder is right, for texts whose task is known."""
    family = family_of(config, "encoder")
    correct = [0] * len(asked)
    for rows in batches(asked):
        ids, mask = pad([asked[row].ids for row in rows], 0)
        logits = head_logits(family, head, head_inputs(family, encoder(input_ids=ids, attention_mask=mask)))
        for row, chosen in zip(rows, logits.argmax(1).tolist(), strict=True):
            correct[row] = int(chosen == asked[row].label)
    return correct


class Suite:
    """The tasks, their classifiers and the encoder under them."""

    def __init__(self, classifiers: Path, downloads: Path, work: Path, limit: tuple[int, int]) -> None:
        self.tasks = suite()
        self.classifiers = classifiers
        self.downloads = downloads
        self.work = work
        self.validation = questions(self.tasks, downloads, "validation", limit[0])
        self.test = questions(self.tasks, downloads, "test", limit[1])
        self.base = save_encoder(find_base(), work / "base")
        self.fine_tunes = [
            ClassifierFineTune(task.name, classifiers / task.name, self.base) for task in self.tasks
        ]

    def alone(self, asked: Questions) -> Correct:
        """Every classifier on its own task: 100 by definition."""
        found = {}
        for fine_tune in self.fine_tunes:
            encoder = self._encoder(self.base.path)
            own = {name: fine_tune.tensor(name).to(torch.float32) for name in self.base.names}
            encoder.load_state_dict(own)
            found[fine_tune.name] = self._on(encoder, fine_tune, asked)
        return found

    def static(self, method: MergeMethod | None, asked: Questions) -> Correct:
        """One merged encoder (None is the base) with each task's own head, the true task known."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.base.path
            if method is not None:
                path = Path(folder) / "merged"
                write_checkpoint(self.base, merge(self.base, self.fine_tunes, method), path)
            encoder = self._encoder(path)
        return {fine_tune.name: self._on(encoder, fine_tune, asked) for fine_tune in self.fine_tunes}

    def bundle(self, out: Path, scale: float, *, router: bool) -> ClassifierBundle:
        """Twin's bundle at a λ."""
        plan = suite_plan(
            self.tasks, self.classifiers, self.downloads, out,
            method=TaskArithmetic(scale=scale), router=router, overwrite=True,
        )  # fmt: skip
        return build_classifier(plan, lambda line: print(f"  {line}", flush=True))

    def _encoder(self, path: Path) -> Any:
        return AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    def _on(self, encoder: Any, fine_tune: ClassifierFineTune, asked: Questions) -> list[int]:
        return oracle_head(encoder, self.base.config, fine_tune.head, asked[fine_tune.name])


def twin(model: ClassifierModel, asked: Questions, choice: Callable[[str], RoutingChoice]) -> dict[str, Any]:
    """Twin's answers: {"correct": task → 1 or 0, "chosen": task → the expert that answered each text}."""
    correct: dict[str, list[int]] = {}
    chosen: dict[str, list[str]] = {}
    for task, items in asked.items():
        correct[task], chosen[task] = [0] * len(items), [""] * len(items)
        for rows in batches(items):
            answers = model.classify([Text(items[row].ids, choice(task)) for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                if not isinstance(answer, Classified):
                    raise answer
                chosen[task][row] = answer.expert
                correct[task][row] = int(answer.expert == task and answer.best == items[row].label)
    return {"correct": correct, "chosen": chosen}


def oracle(task: str) -> RoutingChoice:
    """The true task's expert alone."""
    return RoutingChoice(gates={task: 1.0})


def normalised(correct: Correct, alone: Correct) -> tuple[float, float]:
    """Mean over tasks of 100 × accuracy over the classifier's own, with its standard error.

    The error is a paired bootstrap over texts: both accuracies are drawn together.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.zeros(1000)
    value = 0.0
    for task, own in alone.items():
        ours, theirs = (torch.tensor(part[task], dtype=torch.float32) for part in (correct, alone))
        rows = torch.randint(len(own), (1000, len(own)), generator=generator)
        draws += 100 * ours[rows].mean(1) / theirs[rows].mean(1)
        value += float(100 * ours.mean() / theirs.mean())
    return value / len(alone), float((draws / len(alone)).std())


def mean_accuracy(correct: Correct) -> float:
    """Mean over tasks, in per cent."""
    return 100 * sum(sum(rows) / len(rows) for rows in correct.values()) / len(correct)


def best(scores: Mapping[float, Correct], alone: Correct) -> float:
    """The λ that is best on validation."""
    return max(scores, key=lambda scale: normalised(scores[scale], alone)[0])


def confusion(chosen: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """True task → expert that answered → texts."""
    return {
        task: {name: list(rows).count(name) for name in sorted(set(rows), key=list(rows).count, reverse=True)}
        for task, rows in chosen.items()
    }


def measure(run: Suite, cells: Cells, out: Path) -> tuple[list[Figure], str]:
    """Every figure, and the tables in Markdown."""
    own_validation = cells.get("alone-validation", lambda: run.alone(run.validation))
    own = cells.get("alone-test", lambda: run.alone(run.test))
    n = sum(len(rows) for rows in own.values())

    def static(name: str, method: MergeMethod | None, asked: Questions) -> Any:
        return cells.get(name, lambda: run.static(method, asked))

    arithmetic = {
        scale: static(f"arithmetic-{scale}-validation", TaskArithmetic(scale=scale), run.validation)
        for scale in SCALES
    }
    ties = {
        scale: static(f"ties-{scale}-validation", Ties(scale=scale), run.validation) for scale in TIES_SCALES
    }
    best_arithmetic, best_ties = best(arithmetic, own_validation), best(ties, own_validation)
    rows: list[tuple[str, Correct, str]] = [
        ("base + heads, oracle head", static("base-test", None, run.test), ""),
        ("averaging, oracle head", static("averaging-test", Averaging(), run.test), ""),
        (
            "task arithmetic, oracle head",
            static(f"arithmetic-{best_arithmetic}-test", TaskArithmetic(scale=best_arithmetic), run.test),
            f"λ {best_arithmetic} of {list(SCALES)} on validation",
        ),
        (
            "TIES, oracle head",
            static(f"ties-{best_ties}-test", Ties(scale=best_ties), run.test),
            f"density {Ties().density}, λ {best_ties} of {list(TIES_SCALES)} on validation",
        ),
    ]

    def twin_validation(scale: float) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            bundle = run.bundle(Path(folder) / "bundle", scale, router=False)
            return twin(ClassifierModel(bundle), run.validation, oracle)["correct"]

    by_scale = {
        scale: cells.get(f"twin-{scale}-validation", lambda scale=scale: twin_validation(scale))
        for scale in TWIN_SCALES
    }
    scale = best(by_scale, own_validation)
    built = cells.get(f"bundle-{scale}", lambda: str(run.bundle(out, scale, router=True).path))
    bundle = ClassifierBundle.open(Path(built))
    model = ClassifierModel(bundle)
    settings = f"shared encoder: task arithmetic λ {scale} of {list(TWIN_SCALES)} on validation, rank {RANK}"
    oracle_answers = cells.get("twin-oracle-test", lambda: twin(model, run.test, oracle))
    routed = cells.get("twin-router-test", lambda: twin(model, run.test, lambda task: RoutingChoice()))
    mixed = RoutingChoice(top_k=len(run.tasks), threshold=0.0)
    softmax = cells.get("twin-softmax-test", lambda: twin(model, run.test, lambda task: mixed))
    rows += [
        ("Twin, oracle gates and head", oracle_answers["correct"], settings),
        ("Twin, routed: unknown task and head", routed["correct"], f"{settings}, the likeliest expert"),
        ("Twin, routed, all experts mixed", softmax["correct"], f"{settings}, the router's softmax over all"),
    ]
    right = [int(name == task) for task, names in routed["chosen"].items() for name in names]
    accuracy = 100 * sum(right) / len(right)
    entries = [bundle.entry(name) for name in bundle.expert_names()]
    nbytes = sum(entry.nbytes for entry in entries) / len(entries)
    share = 100 * nbytes / bundle.manifest.base.nbytes
    figures = [_figure("experts alone, accuracy", mean_accuracy(own), "%", n, "mean over tasks")]
    for name, correct, note in rows:
        value, error = normalised(correct, own)
        bounds = (96.0, 99.4) if name.startswith("Twin, routed: ") else (None, None)
        figures.append(
            _figure(name, value, "% of the expert", n, f"±{error:.2f}; {note}".rstrip("; "), *bounds)
        )
    figures += [
        _figure("router accuracy", accuracy, "%", n, f"{MAX_TEXTS} training texts a task, MLP"),
        Figure(
            "bytes of an expert", nbytes, "bytes", "lower", len(entries), COMMAND, note=f"mean; rank {RANK}"
        ),
        Figure(
            "bytes of an expert, share",
            share,
            "% of the encoder",
            "lower",
            len(entries),
            COMMAND,
            note="mean",
        ),
    ]
    return figures, _tables(figures, rows, own, confusion(routed["chosen"]), run)


def _figure(
    name: str,
    value: float,
    unit: str,
    n: int,
    note: str,
    at_least: float | None = None,
    aim: float | None = None,
) -> Figure:
    return Figure(f"classification: {name}", value, unit, "higher", n, COMMAND, at_least, aim, note)


def _tables(
    figures: Sequence[Figure],
    rows: Sequence[tuple[str, Correct, str]],
    own: Correct,
    confused: Mapping[str, Mapping[str, int]],
    run: Suite,
) -> str:
    names = [task.name for task in run.tasks]
    lines = [
        "# Encoder classification: unknown task and unknown head",
        "",
        f"Made by `{COMMAND}`; commit {report.commit()}. Test texts a task: "
        + ", ".join(f"{name} {len(own[name])}" for name in names)
        + ".",
        "",
        "| | value | unit | n | at least | aim | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        bound, aim = (("" if value is None else f"{value:g}") for value in (figure.at_least, figure.aim))
        lines.append(
            f"| {figure.name.removeprefix('classification: ')} | {figure.value:.2f} | {figure.unit} | {figure.n} "
            f"| {bound} | {aim} | {figure.note} |"
        )
    lines += [
        "", "## By task", "",
        "Accuracy of the classifier alone, then normalised values.", "",
        f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}",
        "| labels | " + " | ".join(str(len(task.labels)) for task in run.tasks) + " |",
        "| alone, accuracy | " + " | ".join(f"{mean_accuracy({name: own[name]}):.1f}" for name in names) + " |",
    ]  # fmt: skip
    for name, correct, _ in rows:
        values = [normalised({task: correct[task]}, {task: own[task]})[0] for task in names]
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    lines += ["", "## Where the router sends test texts", "", "| true task | expert: texts |", "|---|---|"]
    for name in names:
        lines.append(
            f"| {name} | " + ", ".join(f"{key} {count}" for key, count in confused[name].items()) + " |"
        )
    return "\n".join(lines) + "\n"


def fingerprint(run: Suite, *counts: int) -> str:
    """Tells apart runs whose cells must not be mixed: other classifiers, another bundle, other texts."""
    records = [(run.classifiers / task.name / RECORD_NAME).read_text(encoding="utf-8") for task in run.tasks]
    parts = [counts, RANK, MAX_TEXTS, FEATURES.model_dump_json(), records]
    return f"cells-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def main() -> None:
    """Measure, print and write benchmarks/results/classification.{json,md}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classifiers", type=Path, default=CLASSIFIERS)
    parser.add_argument("--downloads", type=Path, default=WORK / "downloads")
    parser.add_argument("--work", type=Path, default=Path(".twinserve/quality/classification"))
    parser.add_argument(
        "--out", type=Path, default=BUNDLE, help="where the measured bundle is left, to be served"
    )
    parser.add_argument("--validation", type=int, default=60, help="validation texts a task")
    parser.add_argument("--test", type=int, default=200, help="test texts a task")
    options = parser.parse_args()
    run = Suite(options.classifiers, options.downloads, options.work, (options.validation, options.test))
    cells = Cells(options.work, fingerprint(run, options.validation, options.test))
    figures, tables = measure(run, cells, options.out)
    report.write(RESULTS / "classification.json", figures)
    (RESULTS / "classification.md").write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
