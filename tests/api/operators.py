"""An operator's side of the admin API: registers, waits, follows jobs, and compares answers with the truth."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from experts.registry.catalogue import Catalogue
from experts.registry.work import entry_script
from tests.api.harness import ADMIN_KEY, Served, eventually

ADMIN = {"X-API-Key": ADMIN_KEY}
PROMPTS = [f"%% {word} {i} %%" for i, word in enumerate(["red", "blue", "pink", "teal", "gold"] * 3)]
WAIT = 60
"""Longest that a test waits for a job, in seconds."""


@dataclass(frozen=True)
class Operator:
    """One who has the admin key of a server.

    Attributes:
        others: worker processes of other servers.
    """

    served: Served
    headers: dict[str, str] = field(default_factory=lambda: dict(ADMIN))
    others: frozenset[int] = frozenset()

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One request to `/admin{path}`, extra headers as `headers`; answered as the document tells."""
        headers = {**self.headers, **options.pop("headers", {})}
        if body is not None:
            options["json"] = body
        answer = self.served.http.request(method, f"/admin{path}", headers=headers, **options)
        told = _operation(self.served.url, method, answer.request.url.path)
        if told is not None:
            assert str(answer.status_code) in told["responses"], (method, path, answer.text)
            if answer.status_code >= 400:
                content = told["responses"][str(answer.status_code)]["content"]["application/json"]
                assert answer.json()["error"]["code"] in content["examples"], (method, path, answer.text)
        return answer

    def get(self, path: str, **query: Any) -> Any:
        """What GET answers, which must succeed."""
        answer = self.ask("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POST."""
        return self.ask("POST", path, body, **options)

    def begin(self, headers: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
        """A registration whose job is not waited for."""
        return self.post("/experts", body, headers=headers or {})

    def register(self, headers: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
        """A registration that is seen through."""
        return self.post("/experts", body, params={"wait": WAIT}, headers=headers or {})

    def registered(self, **body: Any) -> dict[str, Any]:
        """The same, which must succeed."""
        answer = self.register(**body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def job(self, job: str) -> dict[str, Any]:
        """A job as it is."""
        return dict(self.get(f"/jobs/{job}"))

    def ended(self, job: str) -> dict[str, Any]:
        """A job once it has ended."""
        state: dict[str, Any] = {}

        def over() -> bool:
            state.update(self.job(job))
            return state["ended_at"] is not None

        assert eventually(over, WAIT), state
        return state

    def events(self, job: str, **headers: str) -> list[tuple[str, str, dict[str, Any]]]:
        """Name, id and data of every event until the stream ends."""
        path, told = f"/admin/jobs/{job}/events", {**self.headers, **headers}
        with self.served.http.stream("GET", path, headers=told) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = "".join(answer.iter_text())
        return parsed_events(text)

    def text(self, **body: Any) -> tuple[str, dict[str, int]]:
        """A greedy answer, and the generations that made it."""
        greedy = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = self.served.complete(**{**greedy, **body})
        return str(answer["choices"][0]["text"]), dict(answer["routing"]["generations"])


@cache
def _operations(url: str) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """The paths of a server's document, those with fewer parameters first."""
    document = httpx.get(f"{url}/openapi.json", timeout=30).raise_for_status().json()
    paths = sorted(document["paths"].items(), key=lambda item: item[0].count("{"))
    return [(re.compile(re.sub(r"{\w+}", "[^/]+", path)), methods) for path, methods in paths]


def _operation(url: str, method: str, path: str) -> dict[str, Any] | None:
    """What the document says of a request; None where it knows no such route."""
    found = (told for pattern, told in _operations(url) if pattern.fullmatch(path))
    return next((told[method.lower()] for told in found if method.lower() in told), None)


def blob_of(state: Path, name: str, number: int, file: str = "expert.safetensors") -> Path:
    """Where a generation's file lies, with the registry's folder."""
    catalogue = Catalogue.open(f"sqlite:///{state / 'catalogue.sqlite'}")
    digest = catalogue.generation(name, number).files[file].sha256
    catalogue.close()
    [found] = (state / "blobs").rglob(digest)
    return found


def parsed_events(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, id and data of server-sent events, comments left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields["id"], json.loads(fields["data"])))
    return found


def worker_pids() -> list[int]:
    """The processes that work on registrations of the servers of these tests."""
    script = str(entry_script()).encode()
    children = {pid for task in Path("/proc/self/task").iterdir() for pid in _children(task)}
    return [pid for pid in children if script in _command(pid)]


@contextlib.contextmanager
def workers_held(others: frozenset[int] = frozenset()) -> Iterator[None]:
    """Registrations come no further: the processes that would work on them, not those of others, are stopped."""
    held: set[int] = set()

    def there() -> bool:
        held.update(set(worker_pids()) - others)
        return bool(held)

    assert eventually(there, 30), "no worker is there"
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _children(task: Path) -> list[int]:
    try:
        return [int(pid) for pid in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
