"""Thousands of connections at once, nearly all of them queued: each gets its own answer, and memory stays bounded.

The engine is first filled by requests that go before all others, so that none of the measured ones can end before
the last is there; then these make room.
"""

import asyncio
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.api.asking import (
    Answer,
    AnswerError,
    Question,
    ask,
    chunks,
    gather_or_cancel,
    known,
    names,
    new_client,
    question,
)
from benchmarks.api.served import Books, Server

_ROWS = 32
_CHOICES = 16
_PLUGS = 32 * _ROWS // _CHOICES
"""Many times what runs at once: opening thousands of connections takes a while."""


@dataclass(frozen=True)
class Held:
    """What a run showed.

    Attributes:
        together: requests that were running or waiting at one moment.
        distinct: different right answers; were it less than `count`, a mix-up could hide.
        lost: without an answer; `wrong`: with another one's, or a broken one.
        before, after: the server's books, idle.
        peak: bytes of its memory at most.
        seconds: from the first request to the last answer, waiting for the last connection included.
    """

    count: int
    together: int
    distinct: int
    lost: int
    wrong: int
    before: Books
    after: Books
    peak: int
    seconds: float
    complaints: tuple[str, ...]

    @property
    def growth(self) -> int:
        """Bytes of memory that the connections took at most."""
        return self.peak - self.before.resident


def run(bundle: Path, count: int, tokens: int = 16) -> Held:
    """Hold `count` connections open together, every other one a stream."""
    _allow_descriptors(2 * count + 512)
    settings = {
        "max_queue": count + 2 * _PLUGS * _CHOICES,
        "max_batch": _ROWS,
        # Priorities alone decide who is next.
        "max_wait_seconds": 3600.0,
        "kv_cache_bytes": 2**25,
    }
    with Server(bundle, settings) as server:
        return asyncio.run(_measure(server, count, tokens))


async def _measure(server: Server, count: int, tokens: int) -> Held:
    async with new_client(server.url) as client:
        bundle, experts = await names(client)
        questions = [question(number, bundle, experts, tokens) for number in range(count)]
        answers = await known(client, questions)
        before = await server.idle()
        started = time.perf_counter()
        plugs = [asyncio.create_task(_plug(client)) for _ in range(_PLUGS)]
        while (await asyncio.to_thread(server.books)).running < _ROWS:
            await asyncio.sleep(0.02)
        peak = Peak(server)
        watch = asyncio.create_task(peak.watch())
        tasks = [
            asyncio.create_task(_ask(client, one, stream=index % 2 == 1))
            for index, one in enumerate(questions)
        ]
        together = 0
        while together < count and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
            books = await asyncio.to_thread(server.books)
            # What plugs may still hold of the queue is not counted.
            held = _CHOICES * sum(not plug.done() for plug in plugs)
            together = max(together, min(count, books.running + books.waiting - held))
        await gather_or_cancel(*plugs)
        got = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
        await gather_or_cancel(watch)
    async with new_client(server.url) as client:
        after = await server.idle()
    wrong = [(one, right, found) for one, right, found in zip(questions, answers, got, strict=True)
             if isinstance(found, Answer) and found != right]  # fmt: skip
    lost = [found for found in got if isinstance(found, Exception)]
    return Held(
        count=count,
        together=together,
        distinct=len(set(answers)),
        lost=len(lost),
        wrong=len(wrong),
        before=before,
        after=after,
        peak=peak.bytes,
        seconds=seconds,
        complaints=(*map(repr, lost[:5]), *map(repr, wrong[:5])),
    )


async def _ask(client: httpx.AsyncClient, one: Question, *, stream: bool) -> Answer | Exception:
    try:
        return await ask(client, one, stream=stream)
    except (AnswerError, httpx.HTTPError) as error:
        return error


async def _plug(client: httpx.AsyncClient) -> None:
    """Keep rows busy for a while; without the router, whose answer choices would wait for."""
    body = {
        "model": "shared",
        "prompt": "Plug.",
        "n": _CHOICES,
        "max_tokens": 200,
        "ignore_eos": True,
        "priority": -1000,
    }
    async for _ in chunks(client, Question("/v1/completions", body)):
        pass


class Peak:
    """The most memory that a server was seen to use."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.bytes = server.resident()

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            self.bytes = max(self.bytes, self._server.resident())
            await asyncio.sleep(0.05)


def _allow_descriptors(count: int) -> None:
    """For this process and the server that it starts.

    Raises:
        RuntimeError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise RuntimeError(f"{count} open files are needed; `ulimit -Hn` is {hard}")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
