"""Does the router learn better where its learning rate follows the difficulty of its prompts?

Fits the embedded family's router on its real features at every pace of `experts.routing.training.Pace`, several
seeds each, and counts the test questions that it sends to the right expert: as chats, bare, and in a wording that
it was fitted without (two of five for each seed). Differences are paired by seed, against the constant rate.

    python -m benchmarks.quality.router_pace --features FILE        (`feedback` makes the file)
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file
from torch import Tensor

from experts.routing.training import Pace, calibrate, forward, train

COMMAND = "python -m benchmarks.quality.router_pace"
PACES: Mapping[str, Pace] = {
    "constant": Pace(),
    "batch, 0.5-2": Pace("batch"),
    "focal, power 2": Pace("focal"),
}
SEEDS = 5
WORDINGS = 5
FIT = {"epochs": 40, "batch_size": 32, "learning_rate": 5e-4}
"""As `MlpRouter.fit`."""

PROMPTS = {"train": 50, "validation": 25}
"""Of each expert; a router with all 300 is right too often for its pace to matter."""

Rows = dict[str, list[float]]


def names_in(features: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The experts whose features the file holds."""
    return tuple(sorted({key.split(".")[1] for key in features}))


def rows(
    features: Mapping[str, Tensor], side: str, forms: Sequence[str], only: int | None, without: int = -1
) -> tuple[Tensor, Tensor]:
    """(n, d) and labels (n,) of a split, in these forms, of one wording alone or of all but one."""
    found, labels = [], []
    for index, name in enumerate(names_in(features)):
        wording = features[f"{side}.{name}.wording"][: PROMPTS.get(side)]
        kept = wording != without if only is None else wording == only
        for form in forms:
            found.append(features[f"{side}.{name}.{form}"][: PROMPTS.get(side)][kept])
            labels.append(torch.full((int(kept.sum()),), index))
    return torch.cat(found), torch.cat(labels)


def accuracy(
    features: Mapping[str, Tensor],
    pace: Pace,
    seed: int,
    fit: Sequence[str],
    asked: Sequence[tuple[str, int | None]],
    without: int = -1,
) -> tuple[list[float], float]:
    """Accuracy in % for each (form, wording) asked, and the loss in nats on all of them after calibration."""
    training, labels = rows(features, "train", fit, None, without)
    held_out, held_out_labels = rows(features, "validation", fit, None, without)
    centre, spread = training.mean(0), training.std(0, correction=0).clamp(min=1e-6)
    found = train(
        (training - centre) / spread,
        labels,
        (held_out - centre) / spread,
        held_out_labels,
        classes=len(names_in(features)),
        hidden=[256, 256],
        seed=seed,
        pace=pace,
        **FIT,
    )
    warmth = calibrate(forward(found.layers, (held_out - centre) / spread), held_out_labels)
    hits, losses = [], []
    for form, wording in asked:
        questions, truth = rows(features, "test", [form], wording)
        logits = forward(found.layers, (questions - centre) / spread)
        hits.append(100 * float((logits.argmax(1) == truth).float().mean()))
        losses.append(float(torch.nn.functional.cross_entropy(logits / warmth, truth)))
    return hits, mean(losses)


def measure(features: Mapping[str, Tensor], pace: Pace) -> Rows:
    """Form → one value a seed."""
    found: Rows = {
        "chat": [],
        "raw": [],
        "unseen wording": [],
        "unseen, loss in nats": [],
        "seconds a fit": [],
    }
    for seed in range(SEEDS):
        started = time.process_time()
        (chat, raw), _ = accuracy(features, pace, seed, ("chat", "raw"), [("chat", None), ("raw", None)])
        found["seconds a fit"].append(time.process_time() - started)
        found["chat"].append(chat)
        found["raw"].append(raw)
        parts = [
            accuracy(features, pace, seed, ("chat",), [("chat", wording)], wording)
            for wording in (seed % WORDINGS, (seed + 1) % WORDINGS)
        ]
        found["unseen wording"].append(mean(hits[0] for hits, _ in parts))
        found["unseen, loss in nats"].append(mean(loss for _, loss in parts))
    return found


def table(results: Mapping[str, Rows]) -> list[str]:
    """Markdown: mean ± standard error over the seeds, and each pace's paired difference from the constant rate."""
    base = results["constant"]
    columns = list(base)
    lines = ["| pace | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, found in results.items():
        cells = []
        for column in columns:
            cell = f"{mean(found[column]):.2f} ± {_error(found[column]):.2f}"
            if name != "constant" and column != "seconds a fit":
                gaps = [a - b for a, b in zip(found[column], base[column], strict=True)]
                cell += f" ({mean(gaps):+.2f} ± {_error(gaps):.2f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def main() -> None:
    """Measure every pace and write the table and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router_pace.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    features = load_file(arguments.features)
    results: dict[str, Rows] = {}
    for name, pace in PACES.items():
        results[name] = measure(features, pace)
        print(name, {column: round(mean(values), 3) for column, values in results[name].items()}, flush=True)
    text = [
        "# Learning rate by difficulty",
        "",
        f"`{COMMAND}`: router accuracy in % over {SEEDS} seeds, mean ± s.e., and in brackets the paired difference",
        f"from the constant rate. Fitted on {PROMPTS['train']} prompts of each expert, asked test questions that no",
        "router was fitted on; unseen wording: chats in a wording that was left out of the fit.",
        "",
        *table(results),
    ]
    arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
