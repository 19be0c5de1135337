"""A small HTTP client that notes when what arrives: it shares the cores with the server, so it does little."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from service.core import GenerationRequest

_PATH = "/v1/completions"


@dataclass(slots=True)
class Exchange:
    """One answer.

    Attributes:
        latency: seconds from the first byte sent to the last received.
        arrivals: seconds from the first byte sent to each event of a stream.
    """

    latency: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first event."""
        return self.arrivals[0]


@dataclass(frozen=True, slots=True)
class HttpRun:
    """What one run took.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: generated in all.
    """

    seconds: float
    tokens: int
    exchanges: list[Exchange]

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds


def body(request: GenerationRequest, model: str, *, stream: bool) -> dict[str, Any]:
    """The JSON of one completion."""
    gates = request.routing.gates
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.sampling.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        **({} if gates is None else {"gates": dict(gates)}),
    }


def drive(
    url: str, model: str, requests: Sequence[GenerationRequest], clients: int, *, stream: bool
) -> HttpRun:
    """Send all requests with `clients` of them in flight.

    Raises:
        RuntimeError: an answer is not what was asked for.
    """
    bodies = [json.dumps(body(request, model, stream=stream)).encode() for request in requests]
    wanted = [request.sampling.max_tokens for request in requests]
    return asyncio.run(_drive(url, bodies, wanted, clients))


async def _drive(url: str, bodies: Sequence[bytes], wanted: Sequence[int], clients: int) -> HttpRun:
    pending: Iterator[int] = iter(range(len(bodies)))
    exchanges = [Exchange() for _ in bodies]

    async def client() -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for index in pending:
                last = await _exchange(reader, writer, bodies[index], exchanges[index])
                _check(last, wanted[index])
        finally:
            writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return HttpRun(time.perf_counter() - started, sum(wanted), exchanges)


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes, exchange: Exchange
) -> bytes:
    """One request; returns the body, or the last event of a stream."""
    head = (
        f"POST {_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    started = time.perf_counter()
    writer.write(head.encode() + content)
    status, headers = await _head(reader)
    last = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            last = (await reader.readexactly(size + 2))[:-2]
            exchange.arrivals.append(time.perf_counter() - started)
        await reader.readline()
    else:
        last = await reader.readexactly(int(headers["content-length"]))
    exchange.latency = time.perf_counter() - started
    if status != 200:
        raise RuntimeError(f"{status}: {last[:500].decode(errors='replace')}")
    return last


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return status, headers


def _check(last: bytes, wanted: int) -> None:
    if last.lstrip().startswith(b"{"):
        made = json.loads(last)["usage"]["completion_tokens"]
        if made != wanted:
            raise RuntimeError(f"an answer has {made} tokens instead of {wanted}")
    elif b"[DONE]" not in last:
        raise RuntimeError(f"a stream ended with {last[-200:]!r}")
