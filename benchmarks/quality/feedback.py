"""Does feedback mend a router that is wrong, and leave one alone that is right?

Streams of real features of the embedded family (see `feedback_stream`) in which the static router errs. Every
answer is rated: 1 where it was good, else -1; regret is what the best arm would have been worth, minus what the
chosen one was. Compared: the static router, feedback without exploration, feedback with a little.

    python -m benchmarks.quality.feedback
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np
import torch

from benchmarks.quality.feedback_stream import STREAMS, Stream, Streams, features_of
from benchmarks.report import Figure, markdown, show, write
from experts.bundle import Bundle
from experts.routing import SHARED_ARM, Bandit, BanditSpec, ContextMap, Decision, select_gates

COMMAND = "python -m benchmarks.quality.feedback"
SEEDS = 5
POLICIES: Mapping[str, BanditSpec | None] = {
    "static": None,
    "feedback": BanditSpec(),
    "feedback, exploring": BanditSpec(epsilon=0.05),
}


@dataclass(frozen=True)
class Run:
    """One stream under one policy.

    Attributes:
        regret: (n,) cumulative.
        known: share of known questions that go to their expert afterwards.
        explored: share of requests.
    """

    regret: np.ndarray
    known: float
    explored: float


class Prepared:
    """A stream with everything that does not depend on the policy."""

    def __init__(self, stream: Stream) -> None:
        spec, router = BanditSpec(), stream.router
        self.stream = stream
        context = ContextMap.make(router.mean.numpy(), router.std.numpy(), spec.dims, spec.seed)
        self.rows, self.contexts = self._read(stream.features, context)
        self.known_rows, self.known_contexts = self._read(stream.known, context)

    def _read(
        self, features: torch.Tensor, context: ContextMap
    ) -> tuple[list[dict[str, float]], list[np.ndarray]]:
        names = self.stream.router.names
        rows = self.stream.router.probabilities(features).tolist()
        return [dict(zip(names, row, strict=True)) for row in rows], [context.of(f) for f in features.numpy()]

    def run(self, spec: BanditSpec | None, seed: int) -> Run:
        """The stream from beginning to end, then the known questions, without learning more."""
        bandit, stream = Bandit(spec or BanditSpec()), self.stream
        explorer, luck = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
        worth, column = stream.worth.numpy(), {name: index for index, name in enumerate(stream.arms)}
        regrets, explored = [], 0
        for row, context, value in zip(self.rows, self.contexts, worth, strict=True):
            decision, gates = self._route(bandit, row, context, explorer)
            explored += decision.explored
            chosen = max(gates, key=gates.__getitem__) if gates else SHARED_ARM
            chance = float(value[column[chosen]])
            regrets.append(float(value.max()) - chance)
            good = luck.random() < chance
            if spec is not None:
                bandit = bandit.learned(decision, gates, 1.0 if good else -1.0)
        right = 0
        pairs = zip(self.known_rows, self.known_contexts, stream.known_labels.tolist(), strict=True)
        for row, context, label in pairs:
            gates = self._route(bandit, row, context, None)[1]
            right += bool(gates) and column[max(gates, key=gates.__getitem__)] == label
        return Run(np.cumsum(regrets), right / len(self.known_rows), explored / len(regrets))

    def _route(
        self, bandit: Bandit, row: Mapping[str, float], context: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[Decision, dict[str, float]]:
        """As `service.engine.routing.Dispatcher`."""
        router = self.stream.router
        decision = bandit.decide(context, row, router.threshold, rng)
        if decision.alone is not None:
            return decision, {decision.alone: 1.0} if decision.alone != SHARED_ARM else {}
        adjusted = decision.adjusted
        return decision, select_gates(list(adjusted.values()), list(adjusted), router.top_k, router.threshold)


def measure(streams: Streams) -> dict[str, dict[str, list[Run]]]:
    """Scenario → policy → one run a seed."""
    found: dict[str, dict[str, list[Run]]] = {}
    for name, make in STREAMS.items():
        found[name] = {policy: [] for policy in POLICIES}
        for seed in range(SEEDS):
            prepared = Prepared(make(streams, seed))
            for policy, spec in POLICIES.items():
                found[name][policy].append(prepared.run(spec, seed))
        print(
            name,
            {policy: mean(run.regret[-1] for run in runs) for policy, runs in found[name].items()},
            flush=True,
        )
    return found


def figures(results: Mapping[str, Mapping[str, list[Run]]]) -> list[Figure]:
    """Regret in the whole stream and in its last quarter, and what was lost on questions known before."""
    found = []
    for scenario, by_policy in results.items():
        static = by_policy["static"]
        for policy, runs in by_policy.items():
            length, name = len(runs[0].regret), f"{scenario}, {policy}"
            quarter = length // 4
            whole = [100 * float(run.regret[-1]) / length for run in runs]
            late = [100 * float(run.regret[-1] - run.regret[-quarter]) / quarter for run in runs]
            found += [
                _figure(f"{name}: regret a request", whole, length),
                _figure(f"{name}: regret a request, last quarter", late, quarter),
            ]
            if policy == "static":
                continue
            pairs = list(zip(static, runs, strict=True))
            saved = [100 * float(base.regret[-1] - run.regret[-1]) / length for base, run in pairs]
            lost = [100 * (base.known - run.known) for base, run in pairs]
            found += [
                _figure(f"{name}: regret less than static, paired", saved, length, "higher"),
                _figure(f"{name}: accuracy lost on known questions", lost, len(runs), at_least=0.5),
                _figure(f"{name}: explored", [100 * run.explored for run in runs], length),
            ]
    return found


def _figure(
    name: str,
    values: list[float],
    n: int,
    better: Literal["higher", "lower"] = "lower",
    at_least: float | None = None,
) -> Figure:
    note = f"± {_error(values):.2f} s.e. over {SEEDS} seeds"
    return Figure(name, mean(values), "%", better, n, COMMAND, at_least=at_least, note=note)


def draw(results: Mapping[str, Mapping[str, list[Run]]], path: Path) -> None:
    """Cumulative regret by scenario, mean and standard error; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "twinserve", "font.size": 8, "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(results), figsize=(2.6 * len(results), 2.5))
    for axes, (scenario, by_policy) in zip(all_axes, results.items(), strict=True):
        for (policy, runs), colour in zip(by_policy.items(), ("#9aa5b1", "#2e6da4", "#b03a2e"), strict=True):
            length = min(len(run.regret) for run in runs)
            curves = np.stack([run.regret[:length] for run in runs])
            centre, error = curves.mean(0), curves.std(0, ddof=1) / len(runs) ** 0.5
            axes.plot(centre, label=policy, color=colour, linewidth=1)
            axes.fill_between(
                range(length), centre - error, centre + error, color=colour, alpha=0.2, linewidth=0
            )
        axes.set_title(scenario)
        axes.set_xlabel("rated requests")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("cumulative regret")
    all_axes[0].legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def main() -> None:
    """Measure, then write the figures, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--downloads", type=Path, default=Path("build/embedded/downloads"))
    parser.add_argument("--work", type=Path, default=Path(".twinserve/quality/feedback"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.open(arguments.bundle, verify=False)
    # Another bundle has other features: nothing that was kept of it may be used.
    work = arguments.work / bundle.manifest.build_id[:12]
    features = features_of(bundle, work / "features.safetensors", arguments.downloads)
    print(f"features: {work / 'features.safetensors'}")
    started = time.process_time()
    results = measure(Streams(bundle, features, work))
    print(f"{time.process_time() - started:.0f} s of processor time")
    found = figures(results)
    show("feedback", found)
    path = arguments.out / "feedback.json"
    write(path, found)
    (arguments.out / "feedback.md").write_text(
        markdown(path, "Feedback-tuned gates, simulated"), encoding="utf-8"
    )
    draw(results, arguments.out / "feedback.svg")


if __name__ == "__main__":
    main()
