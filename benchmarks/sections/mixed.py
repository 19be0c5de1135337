"""Throughput of a batch with other weights in every row, over the same batch with the same weights in all."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.alone import EngineAlone, defaults
from benchmarks.context import Context
from benchmarks.paired import alternate
from benchmarks.report import Figure
from benchmarks.workload import Load
from experts.bundle import Bundle


def mixed(context: Context) -> list[Figure]:
    """As served, where a batch of equal weights may come to run on merged ones, and without merging."""
    bundle = Bundle.open(context.bundle)
    figures = []
    for title, options in (
        ("as served", defaults()),
        ("merging off", replace(defaults(), mode="factored")),
    ):
        engine = EngineAlone.of_bundle(bundle, options)
        figures += [_cell(context, engine, batch, title) for batch in context.batches(8, 32)]
    return figures


def _cell(context: Context, engine: EngineAlone, batch: int, title: str) -> Figure:
    prompt, new = context.size(64, 16), context.size(64, 6)
    some = Load(tuple(engine.experts), engine.vocabulary, prompt_tokens=prompt, new_tokens=new)
    modes: dict[str, str] = {}

    def rate(load: Load) -> Callable[[int], float]:
        def run(salt: int) -> float:
            made = engine.run(load.requests(batch, salt), batch)
            modes[load.kind] = ", ".join(f"{count} {mode}" for mode, count in sorted(made.modes.items()))
            return made.rate

        return run

    runs = {"distinct": rate(some), "same": rate(replace(some, kind="same"))}
    for run in runs.values():
        run(0)
    found = alternate(runs, context.rounds)
    return context.figure(
        f"mixed / same weights, batch {batch}, {title}",
        [a / b for a, b in zip(found["distinct"], found["same"], strict=True)],
        "x throughput",
        "higher",
        at_least=0.9,
        aim=0.97,
        note=f"pairs of experts; prompt {prompt}, {new} new; steps of distinct ones: {modes['top2']}, "
        f"of same ones: {modes['same']}",
    )
