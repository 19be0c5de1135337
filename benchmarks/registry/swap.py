"""What running requests notice of a swap of bundles: gaps between tokens, and requests that fail."""

import asyncio
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.paired import percentile
from benchmarks.registry.processes import Server
from benchmarks.registry.streams import gaps, stream_all

_TOKENS = 480
_BEGUN_SECONDS = 3.0
_ASK_SECONDS = 0.2
_WAIT_SECONDS = 60.0


@dataclass
class Swapped:
    """What a run showed.

    Attributes:
        rebuilt: seconds that the rebuild took, which made the second bundle.
        without, during: p99 of the gaps between tokens, in seconds, of each pair of runs.
        longest: the longest gap of each run with a swap, in seconds.
        seconds: from the request until new requests are answered by the other bundle.
        asked: short requests sent during swaps; `failed` of them were refused or broke off.
    """

    rebuilt: float = 0.0
    without: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    asked: int = 0
    failed: int = 0


def run(bundle: Path, rounds: int) -> Swapped:
    """Rebuild once, then so many swaps between the two bundles under eight streams and short requests."""
    found = Swapped()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = {"bundle": bundle.absolute(), "state_dir": folder / "state"}
        with Server(settings, folder) as server:
            asyncio.run(stream_all(server, _TOKENS // 4))  # warm
            began = time.monotonic()
            server.ask("POST", "/admin/bundles?wait=600", {}, timeout=660)
            found.rebuilt = time.monotonic() - began
            for number in range(rounds):
                for busy in (False, True) if number % 2 else (True, False):
                    arrivals = _swapped(server, found) if busy else asyncio.run(stream_all(server, _TOKENS))
                    between = gaps(arrivals)
                    (found.during if busy else found.without).append(percentile(between, 0.99))
                    if busy:
                        found.longest.append(max(between))
    return found


def _swapped(server: Server, found: Swapped) -> list[list[float]]:
    """Streams during which the other bundle takes over."""
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(lambda: asyncio.run(stream_all(server, _TOKENS)))
        asking = pool.submit(_ask, server, done, found)
        try:
            time.sleep(_BEGUN_SECONDS)
            other = next(each for each in server.ask("GET", "/admin/bundles")["data"] if each["returnable"])
            began = time.monotonic()
            server.ask("POST", f"/admin/bundles/{other['build_id']}/activate", {}, timeout=_WAIT_SECONDS)
            while not _served(server, other["build_id"]):
                if time.monotonic() - began > _WAIT_SECONDS:
                    raise RuntimeError(f"{other['build_id']} does not serve")
                time.sleep(0.05)
            found.seconds.append(time.monotonic() - began)
            swapped = time.perf_counter()
            arrivals = streaming.result()
            if swapped > min(times[-1] for times in arrivals):
                raise RuntimeError(
                    "the streams ended before the other bundle had taken over; make them longer"
                )
            return arrivals
        finally:
            done.set()
            asking.result()


def _served(server: Server, build: str) -> bool:
    state = server.ask("GET", "/admin/registry")
    return bool(state["served_revision"] == state["revision"] and state["build_id"] == build)


def _ask(server: Server, done: threading.Event, found: Swapped) -> None:
    """Short questions, one after the other."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        while not done.is_set():
            body = {"model": name, "prompt": "Say a word.", "max_tokens": 4, "temperature": 0}
            found.asked += 1
            try:
                found.failed += client.post("/v1/completions", json=body).status_code != 200
            except httpx.HTTPError:
                found.failed += 1
            done.wait(_ASK_SECONDS)
