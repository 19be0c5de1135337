"""From starting the process to the first request that it takes, on a bundle that is built."""

import time

from benchmarks.context import Context
from benchmarks.ours import OurServer
from benchmarks.report import Figure


def startup(context: Context) -> list[Figure]:
    """`twinserve serve` until /health/ready."""
    seconds = []
    for _ in range(context.rounds):
        server = OurServer(context.bundle, context.work)
        started = time.perf_counter()
        with server:
            seconds.append(time.perf_counter() - started)
    note = "imports, digests of all files, weights, compiled layers from the cache, cost model"
    return [context.figure("start-up of the server", seconds, "s", at_least=10, note=note)]
