"""The real server on loopback: uvicorn in a thread over a tiny real bundle."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.runtime import Runtime
from service.serve import assemble
from service.settings import Settings

ADMIN_KEY = "admin-key-of-the-tests"


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        http: a client of its URL.
        app: what it serves.
    """

    url: str
    runtime: Runtime
    http: httpx.Client
    app: Any = None

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON."""
        return self.http.post(path, json=body, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        """One completion that must succeed."""
        answer = self.post("/v1/completions", {"model": "tiny", "prompt": "Add 1 and 2.", **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The data of every event of a stream that must start well."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The parsed chunks of a stream that must end well."""
        events = self.events(path, body)
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def metric(self, name: str) -> float:
        """One sample of /metrics, by its full name with labels."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")


def state_of(bundle: Path) -> Path:
    """Where the registry of a bundle's servers is: beside it, so that a copy of the bundle is without it."""
    return bundle.with_name(f"{bundle.name}-registry")


@contextlib.contextmanager
def serving(bundle: Path, **options: Any) -> Iterator[Served]:
    """Serve a bundle until the block ends; it must then stop by itself."""
    # The mode is fixed: what a cost model decides differs from run to run, and answers tell it. The cache is small:
    # FastAPI keeps every route, and with it the server's memory, until the process ends.
    fixed = {"dtype": "float32", "threads": 1, "mix_mode": "factored", "kv_cache_bytes": 2**25}
    fixed["state_dir"] = state_of(bundle)
    settings = Settings(bundle=bundle, port=0, **{**fixed, **options})
    ready = threading.Event()
    urls: list[str] = []

    def announce(url: str, _: Runtime) -> None:
        urls.append(url)
        ready.set()

    server, runtime = assemble(settings, announce)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        assert ready.wait(30), "the server did not start"
        with httpx.Client(base_url=urls[0], timeout=60) as client:
            yield Served(urls[0], runtime, client, server.config.app)
    finally:
        server.should_exit = True
        thread.join(30)
        runtime.close()
        assert not thread.is_alive(), "the server did not stop"


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """True as soon as the condition holds, False if it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def counts(answer: dict[str, Any]) -> dict[str, int]:
    """The usage of an answer without what the prefix cache gave: that depends on who came before."""
    usage = dict(answer["usage"])
    assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    return usage


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object of a refusal, its shape checked."""
    body = answer.json()
    assert body.keys() == {"error"}, body
    error = dict(body["error"])
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error
