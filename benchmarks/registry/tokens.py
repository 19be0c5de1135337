"""What running streams notice of registrations: gaps between their tokens, with and without, in turn."""

import asyncio
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.paired import percentile
from benchmarks.registry.large import make_full, make_lora
from benchmarks.registry.processes import Server
from benchmarks.registry.streams import gaps, stream_all

Kind = Literal["lora", "full"]

_TOKENS: dict[Kind, int] = {"lora": 240, "full": 480}
"""Of every stream: a whole registration fits into its time."""

_FOLDERS = 4
_NAME = "replaced"


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
            _streamed(server, "lora")  # warm
            for kind, noticed in found.items():
                for number in range(rounds):
                    for busy in (False, True) if number % 2 else (True, False):
                        between = _registering(server, kind, noticed) if busy else _streamed(server, kind)
                        (noticed.during if busy else noticed.without).append(percentile(between, 0.99))
    return found


def _registering(server: Server, kind: Kind, noticed: Noticed) -> list[float]:
    """Gaps of streams that run while one registration follows the other."""
    stop, begun = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        operator = pool.submit(_register_on, server, kind, noticed, stop, begun)
        try:
            if not begun.wait(60):
                raise RuntimeError("no registration begins")
            between = _streamed(server, kind)
        finally:
            stop.set()
        operator.result()
    return between


def _register_on(
    server: Server, kind: Kind, noticed: Noticed, stop: threading.Event, begun: threading.Event
) -> None:
    number = 0
    while not stop.is_set():
        path = f"lora-{number % _FOLDERS}" if kind == "lora" else "full-0"
        job = server.ask("POST", "/admin/experts", {"name": _NAME, "path": path, "replace": True})
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


def _streamed(server: Server, kind: Kind) -> list[float]:
    return gaps(asyncio.run(stream_all(server, _TOKENS[kind], besides=_NAME)))
