"""Clients that ask, stream, hang up and break off at random for minutes: right answers, and nothing left behind."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy

from benchmarks.api.asking import (
    CHAT,
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

_CLIENTS = 24
_SETTINGS = {
    "max_batch": 8,
    # Small, so that sequences also lose their blocks to others and come back.
    "kv_cache_bytes": 2**20,
}
_WARM = 0.3
"""The part of the run after which memory should no longer grow: caches are full by then."""


@dataclass(frozen=True)
class Soaked:
    """What a run showed.

    Attributes:
        done: exchanges by what became of them.
        wrong: answers that differ from the one asked for alone.
        before, after: the server's books, idle.
        samples: seconds since the start and bytes of memory.
    """

    seconds: float
    done: Counter[str]
    wrong: tuple[str, ...]
    before: Books
    after: Books
    samples: tuple[tuple[float, int], ...]

    @property
    def exchanges(self) -> int:
        """All of them."""
        return self.done.total()

    @property
    def warm_seconds(self) -> float:
        """After which memory should no longer grow."""
        return self.seconds * _WARM

    @property
    def slope(self) -> float:
        """Bytes of memory a second, by least squares, after warming up."""
        warm = [sample for sample in self.samples if sample[0] >= self.warm_seconds]
        times, sizes = zip(*warm, strict=True)
        return float(numpy.polyfit(times, sizes, 1)[0])

    @property
    def leaks(self) -> dict[str, int]:
        """What the server holds more than before."""
        return {
            name: getattr(self.after, name) - getattr(self.before, name)
            for name in ("running", "waiting", "kv_blocks", "leases", "tasks", "threads", "descriptors")
        }


def run(bundle: Path, seconds: float, seed: int = 0) -> Soaked:
    """Soak a server of its own."""
    with Server(bundle, _SETTINGS) as server:
        return asyncio.run(_soak(server, seconds, seed))


async def _soak(server: Server, seconds: float, seed: int) -> Soaked:
    async with new_client(server.url) as client:
        bundle, experts = await names(client)
        questions = list(_questions(bundle, experts))
        answers = dict(zip(map(id, questions), await known(client, questions), strict=True))
        # One of each way to end, so that what is made once is there before the books are opened.
        first = _Clients(client, questions, answers, random.Random(seed))
        for way in _WAYS:
            await way(first)
    async with new_client(server.url) as client:
        clients = _Clients(client, questions, answers, random.Random(seed))
        before = await server.idle()
        started = time.monotonic()
        running = [asyncio.create_task(clients.until(started + seconds)) for _ in range(_CLIENTS)]
        samples: list[tuple[float, int]] = []
        while time.monotonic() < started + seconds:
            samples.append((time.monotonic() - started, server.resident()))
            await asyncio.sleep(min(1.0, seconds / 20))
        await asyncio.gather(*running)
    after = await _settled(server, before)
    return Soaked(seconds, clients.done, tuple(clients.wrong), before, after, tuple(samples))


async def _settled(server: Server, before: Books) -> Books:
    """Idle, and its connections' last tasks and descriptors gone, as far as they go within 20 s."""
    for _ in range(100):
        books = await server.idle()
        if books.idle and books.tasks <= before.tasks and books.descriptors <= before.descriptors:
            break
        await asyncio.sleep(0.2)
    return books


def _questions(bundle: str, experts: Sequence[str]) -> list[Question]:
    """All kinds of greedy requests whose answers do not depend on who else asks."""
    made = [question(number, bundle, experts, 4 + number % 24) for number in range(60)]
    for number, one in enumerate(made):
        body: dict[str, Any] = dict(one.body)
        match number % 6:
            case 1:
                body |= {"n": 3}
            case 2:
                body |= {"prompt": [body["prompt"], f"{body['prompt']} again", "third"]}
            case 3:
                body |= {"logprobs": 2}
            case 4:
                content = body.pop("prompt")
                body.pop("echo")
                made[number] = Question(CHAT, {**body, "messages": [{"role": "user", "content": content}]})
                continue
            case 5:
                body |= {"stop": ["q"], "ignore_eos": False}
        made[number] = Question(one.path, body)
    return made


class _Clients:
    """Random exchanges of all kinds, and what became of them."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        questions: Sequence[Question],
        answers: dict[int, Answer],
        draw: random.Random,
    ) -> None:
        self.client = client
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.questions = questions
        self.answers = answers
        self.draw = draw

    async def until(self, deadline: float) -> None:
        """One exchange after the other."""
        while time.monotonic() < deadline:
            await self.draw.choices(_WAYS, _WEIGHTS)[0](self)

    def one(self) -> Question:
        """A question."""
        return self.draw.choice(self.questions)

    async def whole(self) -> None:
        """Ask and compare."""
        await self._compare(stream=False)

    async def streamed(self) -> None:
        """The same in a stream."""
        await self._compare(stream=True)

    async def _compare(self, *, stream: bool) -> None:
        one = self.one()
        try:
            found = await ask(self.client, one, stream=stream)
        except (AnswerError, httpx.HTTPError) as error:
            self.done["failed"] += 1
            self.wrong.append(f"{one}: {error!r}")
            return
        self.done["streamed" if stream else "whole"] += 1
        if found != self.answers[id(one)]:
            self.wrong.append(f"{one}: {found} instead of {self.answers[id(one)]}")

    async def hang_up(self) -> None:
        """Leave a request at any moment, also before it is admitted."""
        task = asyncio.create_task(ask(self.client, self.one(), stream=self.draw.random() < 0.5))
        await asyncio.wait([task], timeout=self.draw.expovariate(8))
        await gather_or_cancel(task)
        self.done["hung up" if task.cancelled() else "too late to hang up"] += 1

    async def leave_stream(self) -> None:
        """Read some chunks of a stream and leave."""
        left = self.draw.randint(1, 8)
        stream = chunks(self.client, self.one())
        try:
            async for _ in stream:
                left -= 1
                if not left:
                    break
        finally:
            await stream.aclose()
        self.done["stream left"] += 1

    async def late(self) -> None:
        """Give the server too little time."""
        one = self.one()
        body = {**one.body, "timeout": self.draw.uniform(0.001, 0.05)}
        status = (await self.client.post(one.path, json=body)).status_code
        self.done[f"timeout, {status}"] += 1
        if status not in (200, 504):
            self.wrong.append(f"{one} with a timeout: {status}")

    async def refused(self) -> None:
        """Ask for what cannot be."""
        one = self.one()
        bad: dict[str, Any] = self.draw.choice(
            [{"model": "nobody"}, {"gates": {"nobody": 1}}, {"max_tokens": 10**6}, {"temperature": 9}]
        )
        status = (await self.client.post(one.path, json={**one.body, **bad})).status_code
        self.done["refused"] += 1
        if status not in (400, 404):
            self.wrong.append(f"{one} with {bad}: {status}")

    async def half_sent(self) -> None:
        """Break off within the body."""
        place = urlsplit(str(self.client.base_url))
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model": "'
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        self.done["half sent"] += 1

    async def asked_around(self) -> None:
        """What generates nothing."""
        path, body = self.draw.choice(
            [
                ("/v1/route", {"prompt": ["Add 1 and 2.", "zebra"]}),
                ("/v1/models", None),
                ("/metrics", None),
                ("/health/ready", None),
            ]
        )
        got = await (self.client.get(path) if body is None else self.client.post(path, json=body))
        self.done[path] += 1
        if got.status_code != 200:
            self.wrong.append(f"{path}: {got.status_code}")


_WAYS = (
    _Clients.whole,
    _Clients.streamed,
    _Clients.hang_up,
    _Clients.leave_stream,
    _Clients.late,
    _Clients.refused,
    _Clients.half_sent,
    _Clients.asked_around,
)
_WEIGHTS = (3, 3, 4, 3, 1, 1, 1, 1)
