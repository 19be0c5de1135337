"""Questions whose answers are known, and a client that asks them, whole or as a stream."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        body: without `stream`.
    """

    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back, without ids and times: equal for equal questions, streamed or not.

    Attributes:
        texts: of each choice.
        usage: prompt and completion tokens.
    """

    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    usage: tuple[int, int]


class AnswerError(Exception):
    """The server refused or broke off."""


@dataclass
class _Choices:
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None

    def add(self, piece: Mapping[str, Any]) -> None:
        """A whole answer, or one chunk of a stream."""
        if "error" in piece:
            raise AnswerError(f"in the stream: {piece['error']}")
        for choice in piece["choices"]:
            index, part = choice["index"], choice.get("message") or choice.get("delta")
            text = choice.get("text", "") if part is None else part.get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            if choice.get("finish_reason") is not None:
                self.reasons[index] = choice["finish_reason"]
        if piece.get("usage"):
            self.usage = (piece["usage"]["prompt_tokens"], piece["usage"]["completion_tokens"])

    def answer(self) -> Answer:
        if self.usage is None or self.texts.keys() != self.reasons.keys():
            raise AnswerError(f"incomplete: usage {self.usage}, ended {sorted(self.reasons)}")
        order = sorted(self.texts)
        return Answer(tuple(self.texts[i] for i in order), tuple(self.reasons[i] for i in order), self.usage)


async def ask(client: httpx.AsyncClient, question: Question, *, stream: bool = False) -> Answer:
    """The answer.

    Raises:
        AnswerError: none came, or not all of it.
        httpx.HTTPError: the connection failed.
    """
    found = _Choices()
    if not stream:
        got = await client.post(question.path, json=dict(question.body))
        if got.status_code != 200:
            raise AnswerError(f"{got.status_code}: {got.text[:500]}")
        found.add(got.json())
        return found.answer()
    async for chunk in chunks(client, question):
        found.add(chunk)
    return found.answer()


async def chunks(client: httpx.AsyncClient, question: Question) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, its end checked."""
    body = {**question.body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", question.path, json=body) as got:
        if got.status_code != 200:
            raise AnswerError(f"{got.status_code}: {(await got.aread())[:500]!r}")
        async for line in got.aiter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))
    raise AnswerError("a stream ended without [DONE]")


def question(number: int, bundle: str, experts: Sequence[str], tokens: int) -> Question:
    """A greedy question like no other: it names its number, and echoes it in the answer."""
    draw = random.Random(number)
    body: dict[str, Any] = {
        "model": bundle,
        "prompt": f"{number}: {' '.join(draw.choices(_WORDS, k=draw.randint(2, 8)))}",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "echo": True,
    }
    kind = number % 4
    if kind == 1:
        body["model"] = draw.choice(experts)
    elif kind == 2:
        body["gates"] = {name: round(draw.uniform(0.1, 1), 2) for name in draw.sample(experts, 2)}
    elif kind == 3:
        body["model"] = "shared"
    return Question(COMPLETIONS, body)


async def known(client: httpx.AsyncClient, questions: Sequence[Question]) -> list[Answer]:
    """The answer of each one asked alone."""
    return [await ask(client, one) for one in questions]


def new_client(url: str) -> httpx.AsyncClient:
    """A client with as many connections as are wanted at once, that waits long."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=httpx.Timeout(600))


async def names(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    """The bundle's name and its experts'."""
    listed = (await client.get("/v1/models")).json()["data"]
    bundle = next(model["id"] for model in listed if model["kind"] == "router")
    return bundle, [model["id"] for model in listed if model["kind"] == "expert"]


async def gather_or_cancel(*running: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their ends, whatever they are."""
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


_WORDS = (
    "river",
    "candle",
    "green",
    "seven",
    "mountain",
    "quiet",
    "paper",
    "orbit",
    "lemon",
    "stone",
    "¿qué?",
)
