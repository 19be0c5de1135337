"""The whole server under a fixed number of clients, over the engine alone, and the latencies of its requests.

The clients are one small process on the same two cores, so what they cost counts against the server.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.alone import EngineAlone
from benchmarks.context import Context
from benchmarks.http_client import HttpRun, drive
from benchmarks.ours import OurServer
from benchmarks.paired import alternate, percentile
from benchmarks.report import Figure
from benchmarks.workload import MEANING, Load, vocabulary_of
from experts.bundle import Bundle


def served(context: Context) -> list[Figure]:
    """Throughput with distinct pairs of experts, answers whole and streamed."""
    bundle = Bundle.open(context.bundle)
    engine = EngineAlone.of_bundle(bundle)
    prompt, new = context.size(64, 16), context.size(64, 6)
    load = Load(tuple(engine.experts), engine.vocabulary, prompt_tokens=prompt, new_tokens=new)
    figures = []
    with OurServer(context.bundle, context.work) as server:
        for clients in context.batches(8, 32):
            for run in _runs(engine, server, replace(load, new_tokens=4), clients).values():
                run(0)
            found = alternate(_runs(engine, server, load, clients), context.rounds)
            for way in ("whole", "streamed"):
                figures.append(
                    context.figure(
                        f"served / engine alone, {clients} clients, {way}",
                        [http / alone for http, alone in zip(found[way], found["alone"], strict=True)],
                        "x throughput",
                        "higher",
                        at_least=0.93,
                        aim=0.98,
                        note=f"{MEANING['top2']}; prompt {prompt}, {new} new, {2 * clients} requests a run; "
                        f"{statistics.median(found[way]):.0f} over HTTP, {statistics.median(found['alone']):.0f} "
                        "tokens/s alone; the clients share the cores",
                    )
                )
    return figures


def _runs(
    engine: EngineAlone, server: OurServer, load: Load, clients: int
) -> dict[str, Callable[[int], float]]:
    number = 2 * clients

    def over_http(salt: int, *, stream: bool) -> float:
        return drive(server.url, server.model, load.requests(number, salt), clients, stream=stream).rate

    return {
        "alone": lambda salt: engine.run(load.requests(number, salt), clients).rate,
        # The server's prefix cache must not know a prompt from the other way.
        "whole": lambda salt: over_http(salt, stream=False),
        "streamed": lambda salt: over_http(-1 - salt, stream=True),
    }


def latency(context: Context) -> list[Figure]:
    """p95 over p50 of whole answers' latencies with 8 clients."""
    bundle = Bundle.open(context.bundle)
    vocabulary, number = vocabulary_of(bundle.shared_path), context.size(64, 16)
    some = Load(bundle.expert_names(), vocabulary, new_tokens=context.size(64, 6))
    figures = []
    with OurServer(context.bundle, context.work) as server:

        def run(load: Load, salt: int, number: int = number) -> HttpRun:
            return drive(server.url, server.model, load.requests(number, salt), 8, stream=False)

        equal, mixed = replace(some, prompt_tokens=64), replace(some, prompt_tokens=(32, 512))
        run(equal, 0, 8)
        runs = [run(equal, salt) for salt in range(1, 1 + context.size(2, 1))]
        figures.append(_spread(context, runs, f"prompt 64, {some.new_tokens} new", (1.5, 1.15)))
        figures.append(
            _spread(context, [run(mixed, 9)], f"prompts 32-512, {some.new_tokens} new", (None, None))
        )
    return figures


def _spread(
    context: Context, runs: Sequence[HttpRun], what: str, bounds: tuple[float | None, float | None]
) -> Figure:
    latencies = [[exchange.latency for exchange in run.exchanges] for run in runs]
    p50, p95, p99 = (
        statistics.median(percentile(each, share) for each in latencies) for share in (0.5, 0.95, 0.99)
    )
    return context.figure(
        f"p95 / p50 of request latency, 8 clients, {what}",
        [percentile(each, 0.95) / percentile(each, 0.5) for each in latencies],
        "x time",
        at_least=bounds[0],
        aim=bounds[1],
        note=f"{MEANING['top2']}; {len(latencies[0])} requests a run; p50 {p50:.2f} s, p95 {p95:.2f} s, "
        f"p99 {p99:.2f} s; {runs[0].rate:.0f} tokens/s",
    )
