"""Real servers in processes of their own: started as an operator does, asked over HTTP, killed without notice."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import httpx

from experts.registry.work import entry_script
from tests.fixtures.object_store import s3_options
from tests.fixtures.postgres import Postgres

ADMIN_KEY = "admin-key-of-the-benchmark"
ADMIN = {"X-API-Key": ADMIN_KEY}

EXACT = {"dtype": "float32", "mix_mode": "factored", "threads": 1, "kv_cache_bytes": 2**25}
"""Answers must not depend on who else runs, nor on what a cost model decides."""

_READY_SECONDS = 120


class Process:
    """A child that is killed when this process ends, however it ends.

    Args:
        argv: its command.
        log: file that gets what it says.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        setpriv = shutil.which("setpriv")
        bound = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [*bound, *argv], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env
            )
        self._log = log

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(60)

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM, and its exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"{self._log}: the process does not end") from None

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-3000:]


class Server:
    """`twinserve serve`, again and again on the same port and settings.

    Args:
        settings: fields of `Settings`.
        folder: gets its log.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"server-{self.port}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TWINSERVE_")}
        told = {"port": self.port, "admin_key": ADMIN_KEY, **settings}
        self._environment = clean | {
            f"TWINSERVE_{name.upper()}": _told(value) for name, value in told.items()
        }
        self._process: Process | None = None
        self.admin = httpx.Client(base_url=self.url, headers=ADMIN, timeout=120)

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It was started, and has not ended."""
        return self._process is not None and self._process.alive

    def start(self) -> float:
        """Start it and wait until it is ready; seconds that took.

        Raises:
            RuntimeError: it ends, or is not ready in time.
        """
        began = time.monotonic()
        self._process = Process([sys.executable, "-m", "service", "serve"], self._log, self._environment)
        while time.monotonic() - began < _READY_SECONDS:
            if not self._process.alive:
                break
            try:
                if self.admin.get("/health/ready").status_code == 200:
                    return time.monotonic() - began
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the server is not ready:\n{self._process.said()}")

    def workers(self) -> list[int]:
        """Processes of its registrations; the spare one too."""
        found = []
        script = str(entry_script())
        for child in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in _read(child).split():
                if script in _read(Path(f"/proc/{pid}/cmdline")):
                    found.append(int(pid))
        return sorted(set(found))

    def kill(self) -> None:
        """kill -9 of the server alone; its workers have to find out."""
        assert self._process is not None
        self._process.kill()

    def stop(self) -> None:
        """As an operator stops it."""
        if self.alive:
            assert self._process is not None
            self._process.stop()

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """What it answers, which must be a success."""
        if body is not None:
            options["json"] = body
        answer = self.admin.request(method, path, **options)
        if answer.status_code >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:1000]}")
        return answer.json()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.stop()
        finally:
            self.close()

    def close(self) -> None:
        """End it without asking."""
        if self.alive:
            self.kill()
        self.admin.close()


class ObjectStore:
    """moto's server with one bucket, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        self.options = json.dumps(s3_options(endpoint))
        self.url = "s3://registry/blobs"
        self._process = Process(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log"
        )
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        for _ in range(600):
            try:
                client.create_bucket(Bucket="registry")
                break
            except Exception:
                if not self._process.alive:
                    raise
                time.sleep(0.1)
        client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()


def new_postgres() -> Postgres:
    """A cluster of its own, with fsync, not started.

    Raises:
        RuntimeError: PostgreSQL is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if not found:
        raise RuntimeError("no PostgreSQL is installed here: apt-get install postgresql")
    return Postgres(found[-1].parent, "postgres" if os.geteuid() == 0 else None, durable=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
