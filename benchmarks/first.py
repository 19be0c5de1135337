"""Mixed-expert decoding against plain `generate`, and serving against the engine alone.

Every ratio pairs runs that follow each other directly, so that a change of the machine's speed hits both;
the value is the median of the ratios.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks import served
from benchmarks.engine_alone import EngineAlone
from benchmarks.report import Figure, show, write
from benchmarks.workload import GateKind, prompt, request

COMMAND = "make bench"
KINDS: tuple[GateKind, ...] = ("shared", "one", "top2")
STEP_BOUNDS = {1: (0.85, 0.6), 8: (1.0, 0.7), 32: (1.1, 0.75)}
MEANING = {
    "shared": "no gates",
    "one": "one expert, gate 1, for every row",
    "top2": "every row its own pair of experts, gates 0.75 and 0.25",
}


class PlainGenerate:
    """`transformers.generate` on the shared expert: bf16, SDPA, greedy, its own KV cache."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model.train(False)
        self._vocabulary = vocabulary

    @torch.inference_mode()
    def run(self, batch: int, length: int, tokens: int) -> float:
        """Seconds for one batch."""
        ids = torch.tensor([prompt(index, length, self._vocabulary) for index in range(batch)])
        started = time.perf_counter()
        self._model.generate(  # type: ignore[misc]  # its own annotation does not fit its mixin
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started


def steps(engine: EngineAlone, repeats: int, length: int, tokens: int, log: Console) -> list[Figure]:
    """Time of a whole batch (prefill and decode) over that of plain `generate`."""
    plain = PlainGenerate(engine.bundle.shared_path, engine.vocabulary)
    figures = []
    for batch, (bound, aim) in STEP_BOUNDS.items():
        make = {
            kind: partial(
                request,
                kind=kind,
                experts=engine.experts,
                length=length,
                tokens=tokens,
                vocabulary=engine.vocabulary,
            )
            for kind in KINDS
        }
        plain.run(batch, length, 8)
        ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
        own: list[float] = []
        times: list[float] = []
        for repeat in range(repeats + 1):
            reference = plain.run(batch, length, tokens)
            taken = {kind: engine.run(make[kind], batch, batch) for kind in KINDS}
            if repeat == 0:
                continue
            times.append(reference)
            own.append(taken["top2"] / taken["shared"])
            for kind in KINDS:
                ratios[kind].append(taken[kind] / reference)
        for kind in KINDS:
            figures.append(
                Figure(
                    name=f"{kind} / generate, batch {batch}",
                    value=statistics.median(ratios[kind]),
                    unit="x time",
                    better="lower",
                    n=repeats,
                    command=COMMAND,
                    at_least=bound if kind == "top2" else None,
                    aim=aim if kind == "top2" else None,
                    note=f"{MEANING[kind]}; generate on the shared expert takes "
                    f"{statistics.median(times) / tokens * 1000:.1f} ms a token",
                )
            )
        figures.append(
            Figure(
                name=f"top2 / own shared step, batch {batch}",
                value=statistics.median(own),
                unit="x time",
                better="lower",
                n=repeats,
                command=COMMAND,
                note="what mixing costs over our own plain step",
            )
        )
        log.print(f"batch {batch}: " + ", ".join(f"{f.name} {f.value:.2f}" for f in figures[-4:]))
    return figures


def serving(
    engine: EngineAlone, path: Path, repeats: int, length: int, tokens: int, log: Console
) -> list[Figure]:
    """Tokens a second over HTTP, distinct pairs of experts, over those of the engine alone."""
    figures = []
    make = partial(
        request,
        kind="top2",
        experts=engine.experts,
        length=length,
        tokens=tokens,
        vocabulary=engine.vocabulary,
    )
    name = engine.bundle.manifest.name
    with served.server(path) as url:
        for clients in STEP_BOUNDS:
            total = max(4, 2 * clients)
            for stream in (False, True):
                ratios, rates = [], []
                for repeat in range(repeats + 1):
                    alone = engine.run(make, total, clients)
                    over_http = served.run(url, name, make, total, clients, stream=stream)
                    if repeat:
                        ratios.append(alone / over_http)
                        rates.append(total * tokens / over_http)
                figures.append(
                    Figure(
                        name=f"served / engine alone, {clients} clients, "
                        + ("streamed" if stream else "whole"),
                        value=statistics.median(ratios),
                        unit="x throughput",
                        better="higher",
                        n=repeats,
                        command=COMMAND,
                        at_least=0.9,
                        aim=0.98,
                        note=f"{statistics.median(rates):.0f} tokens/s over HTTP; clients share the machine's cores",
                    )
                )
                log.print(f"{figures[-1].name}: {figures[-1].value:.2f} ({figures[-1].note})")
    return figures


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    log = Console()
    engine = EngineAlone.open(arguments.bundle)
    sizes = (arguments.repeats, arguments.prompt_tokens, arguments.new_tokens)
    figures = steps(engine, *sizes, log)
    figures += serving(engine, arguments.bundle, *sizes, log)
    write(arguments.out, figures)
    show(f"twinserve on {arguments.bundle}", figures)


if __name__ == "__main__":
    main()
