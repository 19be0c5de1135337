"""The whole server in a process of its own, under a fixed number of clients."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.core import GenerationRequest

_START_SECONDS = 180


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """Start `twinserve serve` on a free port; yields its URL; ends it with SIGTERM."""
    command = [sys.executable, "-m", "service", "serve", "--bundle", str(bundle), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield _url(process)
    finally:
        process.terminate()
        process.wait(60)


def _url(process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + _START_SECONDS
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://[\d.]+:\d+", line)
        if found:
            return found.group()
        if time.monotonic() > deadline:
            break
    raise RuntimeError("the server did not say where it listens")


def run(
    url: str, model: str, make: Callable[[int], GenerationRequest], total: int, clients: int, *, stream: bool
) -> float:
    """Seconds to finish `total` completions with `clients` of them in flight."""
    return asyncio.run(_run(url, model, make, total, clients, stream))


async def _run(
    url: str, model: str, make: Callable[[int], GenerationRequest], total: int, clients: int, stream: bool
) -> float:
    pending = iter(range(total))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def client() -> None:
            for index in pending:
                await _complete(http, model, make(index), stream)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - started


async def _complete(http: httpx.AsyncClient, model: str, request: GenerationRequest, stream: bool) -> None:
    body = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.sampling.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "gates": dict(request.routing.gates or {}),
        "stream": stream,
    }
    if stream:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
            if last != "data: [DONE]":
                raise RuntimeError(f"a stream ended with {last!r}")
        return
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    if answer.json()["usage"]["completion_tokens"] != request.sampling.max_tokens:
        raise RuntimeError(f"a completion is too short: {answer.text}")
