"""Twenty experts: every kind of router on test questions of each, and on prompts that no expert is for.

    python -m benchmarks.quality.routers

Features are read from one shared expert of all experts (task arithmetic). Data-free kinds see weights alone, the
others 50 prompts of each expert and, to calibrate, held-out ones; test questions are seen by none. The data-free
score "contrast" reads every layer, all else the layers of `--taps` and the shipped one.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.figures import ABSTAINED, DATA_FREE, FALSE, FIFTY, JOINING, RESULTS, contribute
from benchmarks.report import Figure, show
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.embedded.build import EmbeddedRecipe
from experts.embedded.settings import embedded_settings
from experts.evaluation.changes import Weights
from experts.evaluation.features import prefixed_features
from experts.evaluation.routing_report import RoutingReport, routing_report
from experts.evaluation.setting import Setting
from experts.evaluation.weights import PatchedModel
from experts.merging import TaskArithmetic
from experts.registry.fitting import Kind, every_layer, fit_router
from experts.registry.responses import responses
from experts.routing import FeatureSpec, Router
from experts.routing.features import narrowed
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.neutral import neutral_prompts
from experts.routing.prompts import render_chat
from experts.routing.subspace import SubspaceRouter

COMMAND = "python -m benchmarks.quality.routers"
FOREIGN = Path(__file__).parent / "ood_prompts.jsonl"
LEARNED: tuple[Kind, ...] = ("mlp", "gaussian", "nearest", "staged")
FREE = ("contrast", "spectral", "arrow", "residual")
Features = Mapping[str, Tensor]


class Reader:
    """Features of texts on the shared expert of a setting's experts.

    Attributes:
        spec: what routers of prompts read.
        wide: every layer below the last, which holds it.
    """

    def __init__(self, setting: Setting, scale: float, spec: FeatureSpec) -> None:
        base = Checkpoint.open(setting.base)
        self.tunes = {name: open_fine_tune(name, folder, base) for name, folder in setting.experts.items()}
        weights = Weights(base, self.tunes)
        self.tokenizer, self._model = load_tokenizer(setting.base), load_model(setting.base)
        shared = weights.shared(TaskArithmetic(scale=scale), tuple(self.tunes))
        PatchedModel(self._model).apply(shared.items())
        self._prefix = self._ids(setting.prefix)
        self.spec, self.base = spec, base
        self.wide = every_layer(spec.model_copy(update={"taps": ()}), base)

    def of(self, texts: Sequence[str]) -> Tensor:
        """(n, d) of whole texts."""
        return prefixed_features(self._model, [self._ids(text) for text in texts], self._prefix, self.spec)

    def wide_of(self, texts: Sequence[str]) -> Tensor:
        """(n, d') of whole texts, every layer."""
        return prefixed_features(self._model, [self._ids(text) for text in texts], self._prefix, self.wide)

    def wide_chats(self, prompts: Sequence[str]) -> Tensor:
        """(n, d') of bare user messages, every layer."""
        ids = [render_chat(self.tokenizer, prompt) for prompt in prompts]
        return prefixed_features(self._model, ids, self._prefix, self.wide)

    def narrow(self, features: Features) -> dict[str, Tensor]:
        """Of features of every layer, those that routers of prompts read."""
        return {name: narrowed(rows, self.wide, self.spec) for name, rows in features.items()}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def learned(kind: Kind, train: Features, held: Features, reader: Reader, rate: float) -> Router:
    """A router of 50 prompts an expert."""
    return fit_router(kind, train, held, reader.spec, guard_rate=rate)


def data_free(score: Any, reader: Reader, background: Tensor) -> SubspaceRouter:
    """A router of weights alone, and of every layer's features of neutral prompts."""
    spec = reader.wide if score == "contrast" else reader.spec
    rows = {name: responses(tune.delta, reader.base, spec.read) for name, tune in reader.tunes.items()}
    return SubspaceRouter.of(rows, narrowed(background, reader.wide, spec), spec, score=score)


def joining(train: Features, held: Features, reader: Reader, texts: Sequence[str], rate: float) -> float:
    """Seconds for the last expert to join the other nineteen: features of its prompts and the refit."""
    *others, last = train
    router = learned("gaussian", {n: train[n] for n in others}, {n: held[n] for n in others}, reader, rate)
    started = time.perf_counter()
    features = reader.of(texts)
    count = len(features) * 4 // 5
    router.refitted(last, features[:count], features[count:], 0)
    return time.perf_counter() - started


def figures(
    reports: Mapping[str, RoutingReport], best: str, free: str, seconds: float, joined: int, strange: int
) -> list[Figure]:
    """What must be shown, of a kind named before anything was measured; then every kind's own."""
    chosen, count = reports[best], next(iter(reports.values())).prompts
    foreign = chosen.detected
    found = [
        DATA_FREE.figure(100 * reports[free].accuracy, count, COMMAND, f"subspace, score {free}"),
        FIFTY.figure(100 * chosen.accuracy, count, COMMAND,
                     f"{best}; with abstentions {100 * chosen.routed_right:.1f}"),
        ABSTAINED.figure(
            100 * sum(foreign.values()) / len(foreign), strange, COMMAND,
            f"{best}, mean over kinds: " + ", ".join(f"{k} {100 * v:.0f}" for k, v in foreign.items()),
        ),
        FALSE.figure(100 * chosen.false_abstention, count, COMMAND, best),
        JOINING.figure(seconds, 1, COMMAND, f"gaussian: features of {joined} prompts and the refit, one thread"),
    ]  # fmt: skip
    for name, report in reports.items():
        worst = "; ".join(f"{s.expert}→{s.taken_by} {100 * s.share:.0f} %" for s in report.shadows[:3])
        note = (
            f"routed right with abstention {100 * report.routed_right:.1f} %; false abstention "
            f"{100 * report.false_abstention:.1f} %; calibration error {report.calibration_error:.3f}; "
            f"{report.milliseconds:.2f} ms; {worst}"
        )
        found.append(
            Figure(
                f"router {name}: accuracy", 100 * report.accuracy, "%", "higher", count, COMMAND, note=note
            )
        )
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("build/embedded"))
    parser.add_argument("--quality", type=Path, default=Path(".twinserve/quality"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", type=Path, default=Path("benchmarks/quality"))
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--taps", type=int, nargs="*", default=[4, 8, 12])
    parser.add_argument("--kind", choices=LEARNED, default="gaussian", help="whose figures must be shown")
    parser.add_argument("--free", choices=FREE, default="contrast", help="the same of the data-free ones")
    parser.add_argument("--guard", type=float, default=EmbeddedRecipe().guard_rate)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = embedded_settings(("twenty",), arguments.base, arguments.quality, 1, arguments.items)["twenty"]
    spec = FeatureSpec(layer=setting.router_layer, taps=tuple(arguments.taps))
    reader = Reader(setting, arguments.scale, spec)
    texts = {name: prompts.train[: arguments.prompts] for name, prompts in setting.prompts.items()}
    train = {name: reader.of(own) for name, own in texts.items()}
    held = {name: reader.of(prompts.validation) for name, prompts in setting.prompts.items()}
    asked = {
        name: reader.wide_of([question.text for question in setting.tasks[name].test])
        for name in setting.experts
    }
    foreign: dict[str, Tensor] = {
        name: reader.wide_of([question.text for question in setting.tasks[name].test])
        for name in setting.held_out()
    }
    kinds: dict[str, list[str]] = {}
    for line in FOREIGN.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kinds.setdefault(entry["kind"], []).append(entry["prompt"])
    foreign |= {kind: reader.wide_chats(prompts) for kind, prompts in kinds.items()}
    narrow = reader.narrow(asked), reader.narrow(foreign)
    reports: dict[str, RoutingReport] = {
        kind: routing_report(learned(kind, train, held, reader, arguments.guard), *narrow) for kind in LEARNED
    }
    background = reader.wide_chats(neutral_prompts(reader.tokenizer))
    for score in FREE:
        router = data_free(score, reader, background)
        read = (asked, foreign) if router.spec == reader.wide else narrow
        reports[score] = routing_report(router, *read)
    last = list(train)[-1]
    made = figures(
        reports,
        arguments.kind,
        arguments.free,
        joining(train, held, reader, texts[last], arguments.guard),
        len(texts[last]),
        sum(len(rows) for rows in foreign.values()),
    )
    text = json.dumps({name: report.to_json() for name, report in reports.items()}, indent=1)
    (arguments.tables / "routers.json").write_text(text + "\n", encoding="utf-8")
    contribute(made, COMMAND, arguments.out)
    show(f"routers of {len(setting.experts)} experts", made)


if __name__ == "__main__":
    main()
