"""Eight streams at once, and the gaps between their tokens."""

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

import httpx

from benchmarks.registry.processes import Server

STREAMS = 8


def gaps(arrivals: list[list[float]]) -> list[float]:
    """Seconds between tokens of all streams, from when the last of them has begun until the first one ends."""
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    return [b - a for times in arrivals for a, b in pairwise(times) if begin <= a and b <= end]


async def stream_all(server: Server, tokens: int, besides: str = "") -> list[list[float]]:
    """When each token of each stream came.

    Args:
        server: with two experts at least.
        tokens: of every stream.
        besides: an expert that no stream asks, since others replace it.

    Raises:
        RuntimeError: a stream was refused, or is shorter than it should be.
    """
    bundle = server.ask("GET", "/admin/bundles")["data"][0]["name"]
    names = [each["name"] for each in server.ask("GET", "/admin/experts")["data"] if each["name"] != besides]
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        return await asyncio.gather(
            *(_stream(client, bundle, names, number, tokens) for number in range(STREAMS))
        )


async def _stream(
    client: httpx.AsyncClient, bundle: str, names: list[str], number: int, tokens: int
) -> list[float]:
    pair = (names[number % len(names)], names[(number + 1) % len(names)])
    body: dict[str, Any] = {
        "model": bundle,
        "gates": dict(zip(pair, (0.7, 0.3), strict=True)),
        "prompt": f"{number} {time.monotonic()}: a long story about a river, a candle and a mountain.",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    arrivals, count = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as got:
        if got.status_code != 200:
            raise RuntimeError(f"{got.status_code}: {(await got.aread())[:500]!r}")
        async for line in got.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: ")).get("choices") or []
                if choices and choices[0].get("token_ids"):
                    arrivals.append(time.perf_counter())
                    count += len(choices[0]["token_ids"])
    if count != tokens or len(arrivals) < tokens // 2:
        raise RuntimeError(f"of a stream of {tokens} tokens {count} came, in {len(arrivals)} pieces")
    return arrivals
