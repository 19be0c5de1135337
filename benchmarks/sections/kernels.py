"""Where the milliseconds of a served decode step go: clocks around the server's own parts, in this process.

The server runs as always, HTTP included; the clients are a process of their own. Times are exclusive: what a part
spends in a part that has a line of its own is not counted in it, so the lines add up to the whole turn of
the engine thread. The event loop works beside it, on the other core and under the same GIL.
"""

import asyncio
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

from benchmarks.context import Context
from benchmarks.http_client import drive
from benchmarks.kernel_times import KernelTimes, KernelTimesUnavailableError, instrumented
from benchmarks.ours import cpu_seconds
from benchmarks.report import Figure
from benchmarks.workload import MEANING, Load
from service import serve
from service.core import StepStats
from service.engine import engine as engine_module
from service.engine.text import TextStream
from service.runtime import Runtime, RuntimeSwitch
from service.settings import Settings

T = TypeVar("T")

LAYERS = "decoder layers: calls and memory between the kernels"
"""What is left of the compiled layers when their kernels are taken out."""


class Clock:
    """Exclusive seconds by part, step by step. For one thread."""

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def around(self, part: str, call: Callable[..., T]) -> Callable[..., T]:
        """The same call, timed."""

        def timed(*args: Any, **options: Any) -> T:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                took = time.perf_counter() - started
                self.times[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    def take(self) -> dict[str, float]:
        """What has added up; begins again."""
        found, self.times = dict(self.times), defaultdict(float)
        return found


class Watch:
    """Puts clocks into a runtime and keeps what its pure decode steps took."""

    def __init__(self, runtime: Runtime, kernels: KernelTimes | None) -> None:
        self.turns: list[tuple[StepStats, dict[str, float]]] = []
        self._clock = Clock()
        self._kernels = kernels
        self._last: StepStats | None = None
        self._attach(runtime)

    def of(self, rows: int) -> list[dict[str, float]]:
        """Seconds by part of every turn that decoded that many rows and nothing else."""
        return [
            times for stats, times in self.turns if stats.decode_rows == rows and not stats.prefill_tokens
        ]

    def _attach(self, runtime: Runtime) -> None:
        thread, engine = runtime._thread, runtime._engine
        model = engine.model
        self._put(thread, "_turn", "engine thread: inbox and waiting for the GIL")
        self._put(thread, "_report", "handing events and metrics over")
        self._put(engine, "step", "engine: Python of the step")
        self._put(engine, "_plan", "scheduling")
        self._put(engine, "_conclude", "engine: Python after the forward pass")
        self._put(engine_module, "run_step", "engine: packing the batch")
        self._put(engine_module, "sample", "sampling")
        self._put(TextStream, "push", "detokenising")
        self._put(model, "forward", "forward pass: Python")
        self._put(model.cache, "place", "block tables")
        self._put(model.bank, "set_gates", "setting gates")
        if model.native is not None:
            self._put(model.native, "begin", "block tables")
            self._put(model.native, "run", LAYERS)
            self._put(model.native.parts.embedding, "forward", "embedding")
            self._put(model.native.parts.norm, "forward", "last norm")
            self._put(model.native.parts.head, "forward", "vocabulary head")
        # Bookkeeping of steps and turns, outside of their clocks.
        setattr(engine, "step", self._step(engine.step))  # noqa: B010 an instance's own, on purpose
        setattr(thread, "_turn", self._turn(thread._turn))  # noqa: B010

    def _put(self, owner: object, name: str, part: str) -> None:
        setattr(owner, name, self._clock.around(part, getattr(owner, name)))

    def _step(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> Any:
            result = call()
            self._last = result.stats
            return result

        return step

    def _turn(self, call: Callable[[], bool]) -> Callable[[], bool]:
        def turn() -> bool:
            going = call()
            times, stats, self._last = self._clock.take(), self._last, None
            inner = self._kernels.take() if self._kernels is not None else {}
            if stats is not None:
                times[LAYERS] -= sum(inner.values())
                times |= {f"decoder layers: {kind}": seconds for kind, seconds in inner.items()}
                self.turns.append((stats, times))
            return going

        return turn


def kernels(context: Context) -> list[Figure]:
    """Streamed answers for 8 and for 32 clients, every row its own pair of experts."""
    folder = context.work / "kernel-times"
    try:
        library = instrumented(folder)
    except KernelTimesUnavailableError as error:
        context.log.print(f"  kernels are not told apart: {error}")
        library = None
    announced: list[str] = []
    settings = Settings(bundle=context.bundle, port=0)
    if library is not None:
        settings = settings.model_copy(update={"native_cache": folder})
    server, runtime = serve.assemble(settings, lambda url, _: announced.append(url))
    try:
        times = KernelTimes(library) if library is not None else None
        watch = Watch(runtime.runtime, times)
        return asyncio.run(_measure(context, server, runtime, watch, announced))
    finally:
        runtime.close()


async def _measure(
    context: Context, server: Any, runtime: RuntimeSwitch, watch: Watch, announced: list[str]
) -> list[Figure]:
    serving = asyncio.create_task(server.serve())
    while not announced:
        await asyncio.sleep(0.05)
    figures: list[Figure] = []
    names = tuple(status.name for status in runtime.experts())
    some = Load(names, runtime.vocab_size, prompt_tokens=64, new_tokens=context.size(64, 8))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loop = asyncio.get_running_loop()
        for clients in context.batches(8, 32):
            send = partial(drive, announced[0], runtime.bundle_name, clients=clients, stream=True)
            await loop.run_in_executor(pool, partial(send, some.requests(clients, 0)))
            watch.turns.clear()
            (pid,) = pool._processes
            before, loop_before = cpu_seconds(pid), time.thread_time()
            await loop.run_in_executor(pool, partial(send, some.requests(2 * clients, 1)))
            turns = len(watch.turns)
            beside = {
                "beside: event loop (processor time)": (time.thread_time() - loop_before) / turns,
                "beside: clients (processor time)": (cpu_seconds(pid) - before) / turns,
            }
            figures += _figures(context, watch.of(clients), beside, clients)
    server.should_exit = True
    await serving
    return figures


def _figures(
    context: Context, turns: list[dict[str, float]], beside: dict[str, float], clients: int
) -> list[Figure]:
    whole = [sum(times.values()) for times in turns]
    middle = statistics.median(whole)
    where = f"served decode step, {clients} clients"
    figures = [
        context.figure(
            f"{where}: whole turn",
            [1000 * middle],
            "ms",
            note=f"median of {len(turns)} turns; {MEANING['top2']}; parts: means over turns within 25 % of it",
        )
    ]
    usual = [times for times, total in zip(turns, whole, strict=True) if abs(total / middle - 1) <= 0.25]
    parts = {part for times in usual for part in times}
    means = {part: statistics.fmean(times.get(part, 0.0) for times in usual) for part in parts}
    for part, seconds in sorted(means.items(), key=lambda item: -item[1]) + list(beside.items()):
        figures.append(context.figure(f"{where}: {part}", [1000 * seconds], "ms"))
    return figures
