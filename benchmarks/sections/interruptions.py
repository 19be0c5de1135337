"""What others notice: gaps between the tokens of 8 streams while experts are published or a long prompt comes."""

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace

from benchmarks.alone import renamed
from benchmarks.context import Context
from benchmarks.live import Stream, follow, open_live, together
from benchmarks.paired import percentile
from benchmarks.report import Figure
from benchmarks.workload import MEANING, Load
from experts.bundle import Bundle
from service.runtime import LiveChange, Runtime

ROWS = 8
LONG_PROMPT = 2048

_PUBLISHED = "published-again"
_GENERATIONS = 10_000
"""Of one round; the next round's begin above."""


def loading(context: Context) -> list[Figure]:
    """Every second an expert is read from disk, prepared and published, each time as the next generation."""
    return _measured(context, _loading)


async def _loading(context: Context, bundle: Bundle, runtime: Runtime) -> Figure:
    load = _load(context, bundle, runtime)
    # A stream begins when the prompts of all are done, hence not every gap counts.
    load = replace(load, new_tokens=context.size(160, 8))
    count = 0

    async def gaps(salt: int, *, publishing: bool) -> list[float]:
        nonlocal count
        publisher = asyncio.create_task(_publish(runtime, bundle, salt)) if publishing else None
        streams = await together(runtime, load.requests(ROWS, salt))
        if publisher is not None:
            publisher.cancel()
            count += await publisher
        begin = max(stream.arrivals[0] for stream in streams)
        return [gap for stream in streams for gap in stream.gaps(begin)]

    await gaps(0, publishing=True)
    count = 0
    without: list[float] = []
    during: list[float] = []
    for number in range(1, 1 + context.rounds):
        order = (False, True) if number % 2 else (True, False)
        for publishing in order:
            found = await gaps(2 * number + publishing, publishing=publishing)
            (during if publishing else without).append(percentile(found, 0.99))
    return context.figure(
        "p99 inter-token with an expert published every second / without",
        [a / b for a, b in zip(during, without, strict=True)],
        "x time",
        at_least=1.5,
        aim=1.1,
        note=f"{statistics.median(during) * 1000:.1f} and {statistics.median(without) * 1000:.1f} ms; engine thread "
        f"and event loop, {ROWS} streams of {load.new_tokens} tokens, {MEANING['top2']}; {count} publications",
    )


async def _publish(runtime: Runtime, bundle: Bundle, salt: int) -> int:
    """Publish once a second until cancelled; returns how often."""
    router = bundle.router()
    names = bundle.expert_names()
    done = 0
    with suppress(asyncio.CancelledError):
        while True:
            began = time.monotonic()
            original = await asyncio.to_thread(bundle.expert, names[done % len(names)])
            generation = salt * _GENERATIONS + done + 1
            change = LiveChange((renamed(original, _PUBLISHED, generation),), router=router)
            await runtime.apply(change)
            done += 1
            await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
    return done


def longprompt(context: Context) -> list[Figure]:
    """A prompt of 2048 tokens joins 8 streams that decode."""
    return _measured(context, _longprompt)


def _measured(
    context: Context, measure: Callable[[Context, Bundle, Runtime], Coroutine[None, None, Figure]]
) -> list[Figure]:
    bundle = Bundle.open(context.bundle)
    runtime = open_live(context.bundle)
    try:
        return [asyncio.run(measure(context, bundle, runtime))]
    finally:
        runtime.close()


async def _longprompt(context: Context, bundle: Bundle, runtime: Runtime) -> Figure:
    load = replace(_load(context, bundle, runtime), new_tokens=context.size(160, 30))
    long = replace(load, prompt_tokens=context.size(LONG_PROMPT, 64), new_tokens=2)
    warm = context.size(48, 6)
    ratios, before, during, arrival = [], [], [], []
    for number in range(1 + context.size(context.rounds + 2, 1)):
        streams = [Stream() for _ in range(ROWS)]
        tasks = [
            asyncio.create_task(follow(runtime, request, stream))
            for request, stream in zip(load.requests(ROWS, number), streams, strict=True)
        ]
        while not all(len(stream.arrivals) >= warm for stream in streams):
            await asyncio.sleep(0.005)
        begin = max(stream.arrivals[0] for stream in streams)
        sent = time.perf_counter()
        late = await follow(runtime, long.requests(1, number)[0], Stream())
        await asyncio.gather(*tasks)
        if not number:
            continue
        quiet = [gap for stream in streams for gap in stream.gaps(begin, sent)]
        busy = [gap for stream in streams for gap in stream.gaps(sent, late.arrivals[0])]
        before.append(percentile(quiet, 0.99))
        during.append(percentile(busy, 0.99))
        ratios.append(during[-1] / before[-1])
        arrival.append(late.arrivals[0] - sent)
    return context.figure(
        f"p99 inter-token of {ROWS} others while a prompt of {long.prompt_tokens} tokens is read / before",
        ratios,
        "x time",
        at_least=2.5,
        aim=1.5,
        note=f"{statistics.median(during) * 1000:.1f} and {statistics.median(before) * 1000:.1f} ms; the long "
        f"prompt's first token after {statistics.median(arrival):.2f} s; {MEANING['top2']}; engine thread "
        "and event loop",
    )


def _load(context: Context, bundle: Bundle, runtime: Runtime) -> Load:
    return Load(bundle.expert_names(), runtime.vocab_size, prompt_tokens=context.size(64, 16))
