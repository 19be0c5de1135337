"""How deep must the router read, and can its pass be the generation's own first layers?

Three ways to serve a request whose gates are not known beforehand, L decoder layers in all:

- *two passes*: the router reads the shared expert after k layers (cost k/L of a prefill), then every layer of
  the generation is gated, from the first one on;
- *one pass*: the first k layers are never gated, neither for the prompt nor for the answer, so that what the
  router read is the generation's own beginning; gates act from layer k + 1 on;
- *one pass, answer gated*: the same for the prompt's tokens; those of the answer are gated in every layer.

All answer greedily in bfloat16 on the plain `transformers` model of the shared expert, with every exclusive
vector as served (rank 8) beside its linear layer and the gates of each row of a batch. A router is fitted for
every depth exactly as the bundle's was. Losses are paired: question by question, against two passes whose
router reads all layers, which is how twinserve serves when this is written.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.report import Figure, write
from experts.bundle import Bundle
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.embedded.base import ensure_base
from experts.embedded.build import PROMPTS, EmbeddedRecipe
from experts.embedded.family import factors_folder, family
from experts.embedded.skills.skill import Skill
from experts.embedded.tasks import family_tasks
from experts.evaluation.generation import plain_generator
from experts.evaluation.scoring import score, summarise
from experts.evaluation.task import Question, Task, measure
from experts.evaluation.weights import PatchedModel
from experts.routing import (
    FeatureSpec,
    MlpRouter,
    decoder_layers,
    extract_features,
    load_prompts,
    render_prompts,
    select_gates,
)
from experts.routing.loading import load_model, load_tokenizer

COMMAND = "python -m benchmarks.depth"
READS = (1, 2, 3, 4, 6, 8, 12, 16, 20, -1)
ONE_PASS = (1, 2, 3, 4, 6, 8, 12)
SKIPPED = 100
"""Validation questions of each task that are among the router's own validation prompts."""
WORDINGS = 5
"""Phrasings of every skill: as many more routers are fitted, each without one, and asked in that one."""
BATCH = 64

Part = Literal["validation", "test"]
Scheme = Literal["two passes", "one pass", "one pass, answer gated"]
Gates = tuple[tuple[str, float], ...]
ByTask = Mapping[str, Sequence[float]]


class GatedModel:
    """The shared expert with every exclusive vector beside its layer: y = W*x + Σ g_t·U_tΣ_t(V_tᵀx).

    Attributes:
        gates: (rows, experts) float32, the weights of each row of the coming batches; None: no gates.
        ungated: so many first decoder layers stay as they are,
        answer_gated: but only for the prompt's tokens.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.model = load_model(bundle.shared_path)
        self.dtype = next(iter(self.model.parameters())).dtype
        self.names = bundle.expert_names()
        self.gates: Tensor | None = None
        self.ungated = 0
        self.answer_gated = False
        experts = [bundle.expert(name) for name in self.names]
        modules = dict(self.model.named_modules())
        layers = decoder_layers(self.model)
        depth = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
        for parameter in sorted({p for expert in experts for p in [*expert.factors, *expert.exact]}):
            module = modules.get(parameter.removesuffix(".weight"))
            if not isinstance(module, nn.Linear) or module not in depth:
                raise SystemExit(f"{parameter} is no linear layer of a decoder layer; not measured here")
            factors = [(i, e.factors[parameter]) for i, e in enumerate(experts) if parameter in e.factors]
            owner = torch.cat([torch.full((f.rank,), index) for index, f in factors])
            module.register_forward_hook(
                self._adder(
                    depth[module],
                    owner,
                    torch.cat([f.Vh for _, f in factors]).to(self.dtype),
                    torch.cat([f.S for _, f in factors]),
                    torch.cat([f.U for _, f in factors], dim=1).to(self.dtype),
                )
            )

    def _adder(
        self, depth: int, owner: Tensor, Vh: Tensor, S: Tensor, U: Tensor
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            of_answer = args[0].shape[1] == 1
            if self.gates is None or (depth < self.ungated and not (self.answer_gated and of_answer)):
                return output
            inner = functional.linear(args[0], Vh) * (self.gates[:, owner] * S)[:, None]
            return output + functional.linear(inner.to(output.dtype), U)

        return add


class Answers:
    """Greedy answers, each computed once for a question, its gates and the way it is served."""

    def __init__(self, gated: GatedModel, tokenizer: Any) -> None:
        self._gated, self._tokenizer = gated, tokenizer
        self._generate = plain_generator(gated.model, tokenizer, BATCH)
        self._known: dict[tuple[str, Gates, int, bool], str] = {}

    def values(
        self, tasks: Sequence[Task], part: Part, gates: Mapping[str, Sequence[Gates]], scheme: Scheme, k: int
    ) -> dict[str, list[float]]:
        """Task → the score of each question; `k` layers are left ungated as the scheme says."""
        ungated = 0 if scheme == "two passes" else k
        self._gated.ungated, self._gated.answer_gated = ungated, scheme == "one pass, answer gated"

        def key(question: Question, mix: Gates) -> tuple[str, Gates, int, bool]:
            return question.text, mix, ungated, self._gated.answer_gated and ungated > 0

        missing: dict[int, list[tuple[str, Gates]]] = defaultdict(list)
        for task in tasks:
            for question, mix in zip(getattr(task, part), gates[task.name], strict=True):
                if key(question, mix) not in self._known:
                    missing[task.max_new_tokens].append((question.text, mix))
        for limit, asked in missing.items():
            # By length, as the generator orders a batch: row i of a batch is then question i.
            asked.sort(key=lambda each: len(self._tokenizer(each[0], add_special_tokens=False).input_ids))
            for start in range(0, len(asked), BATCH):
                batch = asked[start : start + BATCH]
                self._gated.gates = torch.tensor(
                    [[dict(mix).get(name, 0.0) for name in self._gated.names] for _, mix in batch]
                )
                answers = self._generate([text for text, _ in batch], limit)
                for (text, mix), answer in zip(batch, answers, strict=True):
                    self._known[key(Question(text, ""), mix)] = answer
        self._gated.gates = None
        return {
            task.name: [
                score(task.metric, [self._known[key(question, mix)]], [question.answer]).mean
                for question, mix in zip(getattr(task, part), gates[task.name], strict=True)
            ]
            for task in tasks
        }


@dataclass(frozen=True)
class Read:
    """A router that reads one depth, fitted as the bundle's was.

    Attributes:
        cost: of one routing pass, as a fraction of a prefill.
        milliseconds: of one routing pass of a single prompt of 64 tokens.
        feature_seconds, fit_seconds: of making the router. All times are of the processor, over all threads.
        chat, raw: task → for each test question, 1.0 if its expert has the highest probability.
        unseen: the same in chat form, by routers fitted in it without the question's wording (see `WORDINGS`).
        gates: part → task → the gates of each question, in the chat form.
    """

    layer: int
    cost: float
    milliseconds: float
    feature_seconds: float
    fit_seconds: float
    chat: ByTask
    raw: ByTask
    unseen: ByTask
    gates: Mapping[Part, Mapping[str, list[Gates]]]


class Prompts:
    """Token ids of everything that routers are fitted and measured on, by expert.

    Attributes:
        fit: split → expert → prompts, chat and raw by turns, as the bundle's build renders them.
        validation: expert → the validation questions.
        test: expert → the test questions, chat and raw by turns.
        wording: split → expert → which of the skill's phrasings each prompt of `fit` and `test` is.
    """

    def __init__(self, tokenizer: Any, tasks: Sequence[Task], downloads: Path, test: int) -> None:
        texts: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}, "test": {}}
        for skill in family():
            lines = load_prompts(PROMPTS / f"{skill.name}.jsonl")
            for side in ("train", "validation"):
                chosen = [line.prompt for line in lines if line.side == side]
                texts[side][skill.name] = chosen[: EmbeddedRecipe.max_prompts]
            texts["test"][skill.name] = [e.prompt for e in skill.load("test", downloads)[:test]]
        rendered = {
            split: {name: render_prompts(tokenizer, each) for name, each in by_name.items()}
            for split, by_name in texts.items()
        }
        self.test = rendered.pop("test")
        self.fit = rendered
        self.validation = {
            task.name: [tokenizer(q.text, add_special_tokens=False).input_ids for q in task.validation]
            for task in tasks
        }
        self.wording = {
            split: {
                skill.name: torch.tensor([_wording(skill, p) for p in texts[split][skill.name]])
                for skill in family()
            }
            for split in texts
        }


def _wording(skill: Skill, prompt: str) -> int:
    """Which phrasing a prompt is: the one with the most words around {x}, where several fit."""
    ends = [phrasing.split("{x}") for phrasing in skill.phrasings]
    fits = [i for i, (begin, end) in enumerate(ends) if prompt.startswith(begin) and prompt.endswith(end)]
    return max(fits, key=lambda i: len(skill.phrasings[i]))


def read_at(layer: int, gated: GatedModel, prompts: Prompts, bundle: Bundle) -> Read:
    """Fit a router at a depth and route every question with it."""
    spec = FeatureSpec(layer=layer)
    last = len(decoder_layers(gated.model))
    served = bundle.router()
    assert served is not None

    def features(ids: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
        return {name: extract_features(gated.model, each, spec) for name, each in ids.items()}

    start = time.process_time()
    training, validation = (features(prompts.fit[side]) for side in ("train", "validation"))
    between = time.process_time()
    router = MlpRouter.fit(
        training, validation, spec, top_k=served.top_k, threshold=served.threshold, seed=EmbeddedRecipe.seed
    )
    end = time.process_time()

    def right(judge: MlpRouter, name: str, found: Tensor) -> list[float]:
        hits: list[float] = (judge.probabilities(found).argmax(1) == judge.names.index(name)).float().tolist()
        return hits

    def routed(found: Tensor) -> list[Gates]:
        rows = router.probabilities(found)
        return [
            tuple(select_gates(row, router.names, router.top_k, router.threshold).items()) for row in rows
        ]

    test = features(prompts.test)
    unseen: dict[str, list[float]] = {name: [] for name in test}
    for left_out in range(WORDINGS):
        judge = MlpRouter.fit(
            {n: each[0::2][prompts.wording["train"][n] != left_out] for n, each in training.items()},
            {n: each[0::2][prompts.wording["validation"][n] != left_out] for n, each in validation.items()},
            spec,
            seed=EmbeddedRecipe.seed,
        )
        for name, found in test.items():
            unseen[name] += right(judge, name, found[0::2][prompts.wording["test"][name] == left_out])
    seconds = []
    for _ in range(20):
        begin = time.process_time()
        router.probabilities(extract_features(gated.model, [list(range(1000, 1064))], spec))
        seconds.append(time.process_time() - begin)
    return Read(
        layer,
        (last if layer == -1 else layer) / last,
        1000 * median(seconds),
        between - start,
        end - between,
        {name: right(router, name, found[0::2]) for name, found in test.items()},
        {name: right(router, name, found[1::2]) for name, found in test.items()},
        unseen,
        {
            "validation": {name: routed(found) for name, found in features(prompts.validation).items()},
            "test": {name: routed(found[0::2]) for name, found in test.items()},
        },
    )


@dataclass(frozen=True)
class Row:
    """One way to serve, on one part of the questions; quality in % of each task's own expert alone.

    Attributes:
        oracle, router: mean over the tasks and its standard error, gates as named.
        loss: baseline minus router, paired by question, and its standard error.
        by_task: the router's, by task.
    """

    scheme: Scheme
    layer: int
    part: Part
    count: int
    oracle: tuple[float, float]
    router: tuple[float, float]
    loss: tuple[float, float]
    by_task: Mapping[str, float]


class Measurement:
    """All rows of one part against its baseline and its yardstick, the experts alone."""

    def __init__(
        self,
        answers: Answers,
        tasks: Sequence[Task],
        part: Part,
        experts: Mapping[str, float],
        reads: Sequence[Read],
    ) -> None:
        self._answers, self._tasks, self._part, self._experts = answers, tasks, part, experts
        self._reads = {read.layer: read for read in reads}
        self._baseline = answers.values(tasks, part, self._reads[-1].gates[part], "two passes", -1)

    def row(self, scheme: Scheme, layer: int) -> Row:
        """Measure one way to serve, with oracle gates and with the router that reads `layer`."""
        routed = self._reads[layer].gates[self._part]
        oracle = {name: [((name, 1.0),)] * len(gates) for name, gates in routed.items()}
        by_oracle = self._answers.values(self._tasks, self._part, oracle, scheme, layer)
        by_router = self._answers.values(self._tasks, self._part, routed, scheme, layer)
        loss = {
            name: [before - now for before, now in zip(self._baseline[name], values, strict=True)]
            for name, values in by_router.items()
        }
        return Row(
            scheme,
            layer,
            self._part,
            min(map(len, by_router.values())),
            self._average(by_oracle),
            self._average(by_router),
            self._average(loss),
            {name: 100 * summarise(values).mean / self._experts[name] for name, values in by_router.items()},
        )

    def _average(self, values: ByTask) -> tuple[float, float]:
        """Mean of the tasks' normalised means, and its standard error; the experts' scores count as exact."""
        scores = {name: summarise(each) for name, each in values.items()}
        means = [100 * scores[name].mean / self._experts[name] for name in scores]
        errors = [100 * scores[name].standard_error / self._experts[name] for name in scores]
        return sum(means) / len(means), sum(error**2 for error in errors) ** 0.5 / len(errors)


def experts_alone(tasks: Sequence[Task], work: Path, log: Console) -> dict[Part, dict[str, float]]:
    """The raw score of each task's own fine-tune, on both parts."""
    folder = ensure_base(work / "base")
    base, model = Checkpoint.open(folder), load_model(folder)
    tunes = {task.name: open_fine_tune(task.name, factors_folder(task.name), base) for task in tasks}
    patched = PatchedModel(model)
    generate = plain_generator(model, load_tokenizer(folder), BATCH)
    alone: dict[Part, dict[str, float]] = {"validation": {}, "test": {}}
    for task in tasks:
        patched.apply((name, tunes[task.name].delta(name)) for name in base.names)
        for part, scores in alone.items():
            scores[task.name] = measure(generate, task, getattr(task, part)).mean
            log.print(f"expert alone, {part}: {task.name} {scores[task.name]:.3f}")
    if any(mean == 0 for scores in alone.values() for mean in scores.values()):
        raise SystemExit("an expert scores 0, so nothing can be normalised by it; ask for more questions")
    return alone


def markdown(reads: Sequence[Read], rows: Sequence[Row], command: str) -> str:
    """The tables, each under the command that remakes it."""
    names = sorted(reads[0].chat)
    accuracy = [
        f"`{command}`",
        "",
        f"Router accuracy in %, on {len(reads[0].chat[names[0]])} test questions of each task, by the layer "
        "that it reads. Cost: of the routing pass, in prefills; ms: one prompt of 64 tokens, router included; "
        f"times are processor time, on {torch.get_num_threads()} of the cores; "
        "unseen: in chat form, by routers fitted without the question's wording.",
        "",
        f"| reads | cost | ms | chat | raw | unseen | {' | '.join(names)} | features s | fit s |",
        "|---" * (len(names) + 8) + "|",
    ]
    for read in reads:
        cells = [f"{_percent([read.chat[name]]):.1f}" for name in names]
        accuracy.append(
            f"| {_depth(read.layer)} | {read.cost:.2f} | {read.milliseconds:.1f} "
            f"| {_percent(read.chat.values()):.1f} | {_percent(read.raw.values()):.1f} "
            f"| {_percent(read.unseen.values()):.1f} | {' | '.join(cells)} "
            f"| {read.feature_seconds:.0f} | {read.fit_seconds:.0f} |"
        )
    for part in ("validation", "test"):
        chosen = [row for row in rows if row.part == part]
        if not chosen:
            continue
        accuracy += [
            "",
            f"`{command}`",
            "",
            f"Quality on {chosen[0].count} {part} questions of each task, % of its own expert alone; loss: "
            "against two passes that read all layers, same questions.",
            "",
            f"| way | layers read | oracle gates | router | loss | {' | '.join(names)} |",
            "|---" * (len(names) + 5) + "|",
        ]
        for row in chosen:
            cells = [f"{row.by_task[name]:.1f}" for name in names]
            means = [f"{mean:.1f} ± {error:.1f}" for mean, error in (row.oracle, row.router, row.loss)]
            accuracy.append(
                f"| {row.scheme} | {_depth(row.layer)} | {' | '.join(means)} | {' | '.join(cells)} |"
            )
    return "\n".join(accuracy) + "\n"


def figures(reads: Sequence[Read], rows: Sequence[Row], command: str) -> list[Figure]:
    """Every value of the tables."""
    found = []
    for read in reads:
        where, count = f"reads {_depth(read.layer)}", sum(map(len, read.chat.values()))
        by_task = ", ".join(f"{name} {_percent([right]):.1f}" for name, right in sorted(read.chat.items()))
        chat, raw, unseen = (_percent(each.values()) for each in (read.chat, read.raw, read.unseen))
        found += [
            Figure(f"router accuracy, chat: {where}", chat, "%", "higher", count, command, note=by_task),
            Figure(f"router accuracy, raw: {where}", raw, "%", "higher", count, command),
            Figure(f"router accuracy, unseen wordings: {where}", unseen, "%", "higher", count, command),
            Figure(f"cost of routing: {where}", read.cost, "prefills", "lower", 1, command),
            Figure(f"routing pass of 64 tokens: {where}", read.milliseconds, "ms", "lower", 20, command),
            Figure(f"router features: {where}", read.feature_seconds, "s", "lower", 1, command),
            Figure(f"router fit: {where}", read.fit_seconds, "s", "lower", 1, command),
        ]
    for row in rows:
        where = f"{row.scheme}, reads {_depth(row.layer)}, {row.part}"
        by_task = ", ".join(f"{name} {value:.1f}" for name, value in sorted(row.by_task.items()))
        for kind, (mean, error) in (("oracle", row.oracle), ("router", row.router), ("loss", row.loss)):
            note = f"standard error {error:.2f}" + (f"; {by_task}" if kind == "router" else "")
            better: Literal["higher", "lower"] = "lower" if kind == "loss" else "higher"
            found.append(
                Figure(f"{kind}: {where}", mean, "% of expert", better, row.count, command, note=note)
            )
    return found


def _percent(right: Iterable[Sequence[float]]) -> float:
    """Mean over the tasks, %."""
    means = [sum(values) / len(values) for values in right]
    return 100 * sum(means) / len(means)


def _depth(layer: int) -> str:
    return "all" if layer == -1 else str(layer)


def main() -> None:
    """Sweep the depths on validation, then measure the best ones on test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="base and downloads")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--items", type=int, default=40, help="validation questions of each task")
    parser.add_argument("--test", type=int, default=200, help="test questions of each task")
    parser.add_argument("--read", type=int, nargs="*", default=READS, help="-1, all layers, has to be there")
    parser.add_argument("--one-pass", type=int, nargs="*", default=ONE_PASS)
    parser.add_argument("--best", type=int, default=2, help="one-pass depths to measure on test")
    arguments = parser.parse_args()
    log = Console(soft_wrap=True)
    began = time.perf_counter()

    def record(row: Row) -> Row:
        """Add a row to what is written; a run that is stopped leaves what it has."""
        rows.append(row)
        log.print(
            f"{time.perf_counter() - began:5.0f} s  {row.part}: {row.scheme}, reads {_depth(row.layer)}: oracle "
            f"{row.oracle[0]:.1f}, router {row.router[0]:.1f}, loss {row.loss[0]:.2f} ± {row.loss[1]:.2f}"
        )
        write(arguments.out / "depth.json", figures(reads, rows, COMMAND))
        (arguments.out / "depth.md").write_text(markdown(reads, rows, COMMAND), encoding="utf-8")
        return row

    reads: list[Read] = []
    rows: list[Row] = []
    bundle = Bundle.open(arguments.bundle)
    tokenizer = load_tokenizer(bundle.shared_path)
    downloads = arguments.work / "downloads"
    tasks = [
        replace(task, validation=task.validation[SKIPPED:])
        for task in family_tasks(family(), tokenizer, downloads, SKIPPED + arguments.items, arguments.test)
    ]
    prompts = Prompts(tokenizer, tasks, downloads, arguments.test)
    gated = GatedModel(bundle)
    for layer in arguments.read:
        reads.append(read_at(layer, gated, prompts, bundle))
        log.print(
            f"{time.perf_counter() - began:5.0f} s  reads {_depth(layer)}: "
            f"{_percent(reads[-1].chat.values()):.1f} % chat, {_percent(reads[-1].raw.values()):.1f} % raw, "
            f"{_percent(reads[-1].unseen.values()):.1f} % of unseen wordings, fit {reads[-1].fit_seconds:.0f} s"
        )
    experts = experts_alone(tasks, arguments.work, log)
    answers = Answers(gated, tokenizer)
    sweep = Measurement(answers, tasks, "validation", experts["validation"], reads)
    for layer in arguments.read:
        record(sweep.row("two passes", layer))
    single: tuple[Scheme, ...] = ("one pass", "one pass, answer gated")
    best: list[tuple[Scheme, int]] = []
    for scheme in single:
        tried = [record(sweep.row(scheme, layer)) for layer in arguments.one_pass]
        best += [(scheme, row.layer) for row in sorted(tried, key=lambda row: row.loss[0])[: arguments.best]]
    final = Measurement(answers, tasks, "test", experts["test"], reads)
    for layer in arguments.read:
        record(final.row("two passes", layer))
    for scheme, layer in best:
        record(final.row(scheme, layer))


if __name__ == "__main__":
    main()
