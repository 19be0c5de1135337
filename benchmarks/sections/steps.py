"""Step time of mixed batches over `transformers.generate` on the plain shared model, and over our own plain step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.alone import EngineAlone, renamed
from benchmarks.context import Context
from benchmarks.gemma import GemmaUnavailableError, ensure_gemma, random_experts
from benchmarks.generate import PlainGenerate
from benchmarks.paired import Run, alternate
from benchmarks.report import Figure
from benchmarks.workload import MEANING, GateKind, Load
from experts.bundle import Bundle

BOUNDS = {1: (0.85, 0.6), 8: (1.0, 0.7), 32: (1.1, 0.75)}
OWN_BOUNDS = {1: (1.2, 1.1), 8: (1.25, 1.1), 32: (1.25, 1.1)}
KINDS: tuple[GateKind, ...] = ("top2", "none", "one", "all")

_Held = tuple[float | None, float | None]
"""What must be met, and what is aimed at."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds of a whole batch, median seconds of its decode steps, and how the steps were served."""

    seconds: float
    step: float
    modes: str


def embedded(context: Context) -> list[Figure]:
    """The embedded family: all kinds of gates, a long and a short prompt, and more registered experts."""
    bundle = Bundle.open(context.bundle)
    engine = EngineAlone.of_bundle(bundle)
    plain = PlainGenerate(bundle.shared_path)
    cell = _Cell(context, "embedded", engine, plain)
    figures: list[Figure] = []
    for batch in context.batches(1, 8, 32):
        figures += cell.measure(batch, KINDS)
    figures += cell.measure(8, ("top2", "none"), prompt=512, rounds=2, bounds=False)
    figures += cell.measure(8, ("top2", "none"), prompt=32, new=128, rounds=2, bounds=False)
    originals = [bundle.expert(name) for name in bundle.expert_names()]
    for registered, batch in ((16, 8), (64, 32))[: context.size(2, 1)]:
        while len(engine.experts) < registered:
            number = len(engine.experts)
            engine.publish(renamed(originals[number % len(originals)], f"copy{number}"))
        figures += cell.measure(batch, ("top2", "none"), rounds=2, bounds=False)
    return figures


def gemma(context: Context) -> list[Figure]:
    """Gemma-3-270M with eight random experts on all linear layers."""
    try:
        path = ensure_gemma(context.work)
    except (GemmaUnavailableError, OSError) as error:
        return [context.missing("top2 / generate, Gemma-3-270M", "x time", "lower", str(error))]
    engine = EngineAlone(path, random_experts(path, 8))
    cell = _Cell(context, "Gemma-3-270M", engine, PlainGenerate(path))
    figures: list[Figure] = []
    for batch in context.batches(1, 8, 32):
        figures += cell.measure(batch, ("top2", "none"), prompt=64, rounds=2)
    return figures


class _Cell:
    """Measures batches of one model."""

    def __init__(self, context: Context, model: str, engine: EngineAlone, plain: PlainGenerate) -> None:
        self._context = context
        self._model = model
        self._engine = engine
        self._plain = plain

    def measure(
        self,
        batch: int,
        kinds: tuple[GateKind, ...],
        *,
        prompt: int = 128,
        new: int = 64,
        rounds: int | None = None,
        bounds: bool = True,
    ) -> list[Figure]:
        """Whole batches and decode steps of every kind, over `generate`, and of pairs over our own without gates."""
        context, engine = self._context, self._engine
        prompt, new = context.size(prompt, 16), context.size(new, 6)
        some = Load(tuple(engine.experts), engine.vocabulary, prompt_tokens=prompt, new_tokens=new)
        loads = {kind: replace(some, kind=kind) for kind in kinds}
        self._plain.run(replace(some, new_tokens=4).requests(batch))
        for load in loads.values():
            engine.run(replace(load, new_tokens=4).requests(batch), batch)

        def reference(salt: int) -> _Run:
            run = self._plain.run(some.requests(batch, salt))
            return _Run(run.seconds, statistics.median(run.steps), "")

        def own(load: Load) -> Run[_Run]:
            def run(salt: int) -> _Run:
                made = engine.run(load.requests(batch, salt), batch)
                modes = ", ".join(f"{count} {mode}" for mode, count in sorted(made.modes.items()))
                return _Run(made.seconds, statistics.median(made.decode_seconds(batch)), modes)

            return run

        runs: dict[str, Run[_Run]] = {"generate": reference}
        runs.update({kind: own(load) for kind, load in loads.items()})
        found = alternate(runs, context.size(rounds or context.rounds, 1))
        where = f"{self._model}, batch {batch}, prompt {prompt}, {new} new"
        if len(engine.experts) != 8:
            where += f", {len(engine.experts)} experts registered"
        held = BOUNDS[batch] if bounds else (None, None)
        own_held = OWN_BOUNDS[batch] if bounds else (None, None)
        return self._figures(found, kinds, where, held, own_held)

    def _figures(
        self,
        found: Mapping[str, Sequence[_Run]],
        kinds: tuple[GateKind, ...],
        where: str,
        held: _Held,
        own_held: _Held,
    ) -> list[Figure]:
        plain, figures = found["generate"], []
        step = statistics.median(run.step for run in plain) * 1000
        figure = self._context.figure
        for kind in kinds:
            runs, bounds = found[kind], held if kind == "top2" else (None, None)
            note = f"{MEANING[kind]}; steps: {runs[-1].modes}"
            figures.append(
                figure(
                    f"{kind} / generate, {where}",
                    [own.seconds / other.seconds for own, other in zip(runs, plain, strict=True)],
                    "x time",
                    at_least=bounds[0],
                    aim=bounds[1],
                    note=note,
                )
            )
            figures.append(
                figure(
                    f"{kind} / generate, decode steps only, {where}",
                    [own.step / other.step for own, other in zip(runs, plain, strict=True)],
                    "x time",
                    note=f"{statistics.median(run.step for run in runs) * 1000:.1f} and {step:.1f} ms a step",
                )
            )
        pairs = list(zip(found["top2"], found["none"], strict=True))
        figures.append(
            figure(
                f"top2 / own plain, {where}",
                [top2.seconds / none.seconds for top2, none in pairs],
                "x time",
                at_least=own_held[0],
                aim=own_held[1],
                note="whole batches",
            )
        )
        figures.append(
            figure(
                f"top2 / own plain, decode steps only, {where}",
                [top2.step / none.step for top2, none in pairs],
                "x time",
            )
        )
        return figures
