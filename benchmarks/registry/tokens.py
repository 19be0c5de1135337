"""What running streams notice of registrations: gaps between their tokens, with and without, in turn."""

import asyncio
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.paired import percentile
from benchmarks.registry.large import make_full, make_lora
from benchmarks.registry.processes import Server

Kind = Literal["lora", "full"]

_STREAMS = 8
_TOKENS: dict[Kind, int] = {"lora": 240, "full": 480}
"""Of every stream: a whole registration fits into its time."""

_FOLDERS = 4


@dataclass
class Noticed:
    """p99 of the gaps between tokens, in seconds, of each pair of runs, and registrations that ended meanwhile."""

    without: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    registered: int = 0
    begun: int = 0

    @property
    def ratios(self) -> list[float]:
        """Of each pair."""
        return [b / a for a, b in zip(self.without, self.during, strict=True)]


def run(bundle: Path, rounds: int) -> dict[Kind, Noticed]:
    """So many pairs of runs for either kind of fine-tune."""
    found: dict[Kind, Noticed] = {"lora": Noticed(), "full": Noticed()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = folder / "fine-tunes"
        for number in range(_FOLDERS):
            make_lora(root / f"lora-{number}", bundle / "shared", number)
        make_full(root / "full-0", bundle / "shared", 0)
        settings = {"bundle": bundle.absolute(), "state_dir": folder / "state", "experts_root": root}
        with Server(settings, folder) as server:
            asyncio.run(_streams(server, "lora"))  # warm
            for kind, noticed in found.items():
                for number in range(rounds):
                    for busy in (False, True) if number % 2 else (True, False):
                        gaps = _gaps(server, kind, noticed) if busy else asyncio.run(_streams(server, kind))
                        (noticed.during if busy else noticed.without).append(percentile(gaps, 0.99))
    return found


def _gaps(server: Server, kind: Kind, noticed: Noticed) -> list[float]:
    """Gaps of streams that run while one registration follows the other."""
    stop, begun = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        operator = pool.submit(_register_on, server, kind, noticed, stop, begun)
        try:
            if not begun.wait(60):
                raise RuntimeError("no registration begins")
            gaps = asyncio.run(_streams(server, kind))
        finally:
            stop.set()
        operator.result()
    return gaps


def _register_on(
    server: Server, kind: Kind, noticed: Noticed, stop: threading.Event, begun: threading.Event
) -> None:
    number = 0
    while not stop.is_set():
        path = f"lora-{number % _FOLDERS}" if kind == "lora" else "full-0"
        job = server.ask("POST", "/admin/experts", {"name": "replaced", "path": path, "replace": True})
        noticed.begun += 1
        number += 1
        told = job
        while told["ended_at"] is None:
            if told["state"] == "running":
                begun.set()
            if stop.is_set() and not told["cancelling"]:
                server.admin.post(f"/admin/jobs/{job['id']}/cancel")
            time.sleep(0.1)
            told = server.ask("GET", f"/admin/jobs/{job['id']}")
        begun.set()
        if told["state"] == "succeeded":
            noticed.registered += not stop.is_set()
        elif told["state"] != "cancelled":
            raise RuntimeError(f"the registration ended otherwise: {told}")


async def _streams(server: Server, kind: Kind) -> list[float]:
    """Gaps between the tokens of all streams, from when the last of them has begun until the first one ends."""
    bundle = server.ask("GET", "/admin/bundles")["data"][0]["name"]
    names = [
        each["name"] for each in server.ask("GET", "/admin/experts")["data"] if each["name"] != "replaced"
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        arrivals = await asyncio.gather(
            *(_stream(client, bundle, names, number, _TOKENS[kind]) for number in range(_STREAMS))
        )
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    return [b - a for times in arrivals for a, b in pairwise(times) if begin <= a and b <= end]


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
    arrivals = []
    async with client.stream("POST", "/v1/completions", json=body) as got:
        if got.status_code != 200:
            raise RuntimeError(f"{got.status_code}: {(await got.aread())[:500]!r}")
        async for line in got.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: ")).get("choices") or []
                if choices and choices[0].get("token_ids"):
                    arrivals.append(time.perf_counter())
    if len(arrivals) < tokens // 2:
        raise RuntimeError(f"a stream of {tokens} tokens came in {len(arrivals)} pieces")
    return arrivals
