"""A server in a process of its own that tells what it holds: memory, descriptors, tasks, sequences, leases.

`Server` starts it and asks; run as a module, this file is that process. It serves as `twinserve serve` does and
answers each line on its standard input with its books as a line of JSON; it ends when the input does.
"""

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FIXED = {"dtype": "float32", "mix_mode": "factored", "threads": 1}
"""Answers must not depend on who else runs, nor on what a cost model decides. The other core is the clients'."""

_CATALOGUE = "/catalogue.sqlite"


@dataclass(frozen=True)
class Books:
    """What the server holds at one moment.

    Attributes:
        tasks: asyncio tasks.
        objects: what Python's collector tracks, after a collection; 0 where none was asked for.
        leases: on expert generations.
        resident: bytes of memory.
    """

    running: int
    waiting: int
    kv_blocks: int
    leases: int
    tasks: int
    threads: int
    descriptors: int
    objects: int
    resident: int

    @property
    def idle(self) -> bool:
        """Nothing is generated, and nothing that a sequence held is left."""
        return self.running == self.waiting == self.kv_blocks == self.leases == 0


class Server:
    """The process, while the block lasts.

    Args:
        bundle: what is served.
        options: fields of `Settings`.
    """

    def __init__(self, bundle: Path, options: Mapping[str, Any] | None = None) -> None:
        settings = {**FIXED, "bundle": str(bundle), "port": 0, **(options or {})}
        # From a copy of the environment: the server's own variables would change what is measured.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TWINSERVE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.api.served", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean,
        )
        self._asking = threading.Lock()
        self.url = self._line().strip()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def books(self, *, collect: bool = False) -> Books:
        """What it holds now, garbage collected first if wanted, which stops it for a moment. Blocks."""
        with self._asking:
            assert self._process.stdin is not None
            self._process.stdin.write("collect\n" if collect else "look\n")
            self._process.stdin.flush()
            return Books(**json.loads(self._line()))

    async def idle(self, seconds: float = 60) -> Books:
        """Its books once it is idle, or as they are after so many seconds."""
        async with asyncio.timeout(seconds * 2):
            for _ in range(int(seconds / 0.1)):
                books = await asyncio.to_thread(self.books)
                if books.idle:
                    break
                await asyncio.sleep(0.1)
            return await asyncio.to_thread(self.books, collect=True)

    def resident(self) -> int:
        """Bytes of its memory; without its help, so also while it is busy."""
        return resident(self.pid)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self._process.wait()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        if code and error is None:
            raise RuntimeError(f"the server ended with {code}")


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _serve(options: Mapping[str, Any]) -> None:
    from service.runtime import RuntimeSwitch
    from service.serve import assemble
    from service.settings import Settings

    def announce(url: str, runtime: RuntimeSwitch) -> None:
        print(url, flush=True)
        loop = asyncio.get_running_loop()
        threading.Thread(target=answer, args=(loop, runtime), daemon=True).start()

    def answer(loop: asyncio.AbstractEventLoop, runtime: RuntimeSwitch) -> None:
        for line in sys.stdin:
            counted = asyncio.run_coroutine_threadsafe(_tasks(), loop).result()
            print(json.dumps(asdict(_books(runtime, counted, collect=line == "collect\n"))), flush=True)
        server.should_exit = True

    server, runtime = assemble(Settings(**options), announce)
    try:
        server.run()
    finally:
        runtime.close()


async def _tasks() -> int:
    return len(asyncio.all_tasks()) - 1  # without this one


def _descriptors() -> int:
    """Open files and sockets; without the catalogue's pool, which grows to its bound while it is busy."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of this very list
            count += _CATALOGUE not in os.readlink(f"/proc/self/fd/{number}")
    return count


def _books(runtime: Any, tasks: int, *, collect: bool) -> Books:
    if collect:
        gc.collect()
    gauges = runtime.gauges()
    return Books(
        running=gauges.running,
        waiting=gauges.waiting,
        kv_blocks=gauges.kv_blocks_used,
        leases=sum(status.leases for status in runtime.experts()),
        tasks=tasks,
        threads=threading.active_count(),
        descriptors=_descriptors(),
        objects=len(gc.get_objects()) if collect else 0,
        resident=resident(os.getpid()),
    )


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
