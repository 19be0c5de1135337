"""A peer that is a server process of its own, driven over HTTP by a fixed number of clients."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.peers.peer import PeerRequest, PeerResultError, PeerRun, PeerUnavailableError, verified

_STOP_SECONDS = 30
_ANSWER_SECONDS = 600
_LOG_TAIL = 2000


class HttpPeer(ABC):
    """Starts a command, waits until it is healthy, sends requests, ends the whole process group."""

    name: str
    start_seconds = 300
    health = "/health"
    route = "/v1/completions"

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """The command line; may prepare files first.

        Raises:
            PeerUnavailableError: it cannot run here.
        """

    @abstractmethod
    def body(self, request: PeerRequest) -> dict[str, Any]:
        """The JSON body of one request."""

    @abstractmethod
    def check(self, answer: dict[str, Any], request: PeerRequest) -> int:
        """How many tokens the server says it generated.

        Raises:
            PeerResultError: it worked on something else than the request.
        """

    @abstractmethod
    def output(self, answer: dict[str, Any]) -> Sequence[int]:
        """The generated ids of one answer; none if the server returns none."""

    def environment(self) -> Mapping[str, str]:
        """Variables that the process gets beside our own."""
        return {}

    def __enter__(self) -> Self:
        port = free_port()
        command = self.command(port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self.environment()}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        """Send all requests with `clients` of them in flight."""
        return asyncio.run(self._run(requests, clients))

    async def _run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        bodies = [self.body(request) for request in requests]
        answers: list[dict[str, Any]] = [{} for _ in requests]
        latencies = [0.0] * len(requests)
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=_ANSWER_SECONDS, limits=limits) as http:

            async def client(pending: Iterable[int]) -> None:
                for index in pending:
                    sent = time.perf_counter()
                    answer = await http.post(self.route, json=bodies[index])
                    latencies[index] = time.perf_counter() - sent
                    if answer.is_error:
                        raise RuntimeError(f"{self.name}: {answer.status_code} {answer.text[:_LOG_TAIL]}")
                    answers[index] = answer.json()

            pending = iter(range(len(requests)))
            started = time.perf_counter()
            await asyncio.gather(*(client(pending) for _ in range(clients)))
            seconds = time.perf_counter() - started
        counts = [self.check(answer, request) for answer, request in zip(answers, requests, strict=True)]
        return verified(seconds, latencies, counts, [self.output(answer) for answer in answers], requests)

    def _wait_until_healthy(self) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise PeerUnavailableError(f"{self.name} ended with {process.returncode}: {self._tail()}")
            try:
                if httpx.get(self.url + self.health, timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise PeerUnavailableError(f"{self.name} was not ready in {self.start_seconds} s: {self._tail()}")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        _signal_group(process, signal.SIGKILL)
        process.wait(_STOP_SECONDS)

    def _tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:].strip()


def check_prompt(found: int, request: PeerRequest) -> None:
    """Raise unless the server read the whole prompt, no token more or less."""
    if found != len(request.prompt_ids):
        raise PeerResultError(f"the server read {found} prompt tokens instead of {len(request.prompt_ids)}")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process and its children: a server's workers would otherwise outlive it and keep the cores."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
