"""Two servers on one PostgreSQL and one object store: how soon what one registers is served by both."""

import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.registry.family import PROFILE, RANK, Family, make_family
from benchmarks.registry.processes import EXACT, ObjectStore, Server, new_postgres

_SECONDS = 60.0
_PAUSE_SECONDS = 0.005


@dataclass
class Converged:
    """What a run showed.

    Attributes:
        seconds: from the commit that put a generation live until both servers answered with it.
        own, other: until the server that registered it did, and until the other one did.
        never: generations that one of them did not serve within a minute.
        wrong: answers of other generations after the new one had answered on the same server.
    """

    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    never: int = 0
    wrong: int = 0


def run(count: int) -> Converged:
    """So many registrations, new names and replacements in turn, on either server in turn."""
    postgres = new_postgres()
    try:
        postgres.start()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            family = make_family(folder / "family", ("alpha", "beta"), 4)
            with ObjectStore(folder) as store:
                settings = {
                    **EXACT,
                    "bundle": family.bundle,
                    "experts_root": family.root,
                    "catalogue": postgres.database(),
                    "blobs": store.url,
                    "blob_options": store.options,
                }
                one = Server({**settings, "state_dir": folder / "one"}, folder)
                two = Server({**settings, "state_dir": folder / "two"}, folder)
                with one, two:
                    return _measure((one, two), family, count)
    finally:
        postgres.remove()


def _measure(servers: tuple[Server, Server], family: Family, count: int) -> Converged:
    found = Converged()
    generations: dict[str, int] = {}
    versions = sorted(name for name in family.versions if name.startswith("v"))
    for number in range(count):
        own, other = servers if number % 4 < 2 else servers[::-1]
        name = f"expert-{number // 2}"  # even numbers make it, odd ones replace it
        expected = generations.get(name, 0) + 1
        watches = [_Watch(server, name, expected) for server in (own, other)]
        body = {"name": name, "path": versions[number % len(versions)], "replace": True, "rank": RANK}
        job = own.ask("POST", "/admin/experts", {**body, "prompts": PROFILE})
        ended = _ended(own, job["id"])
        if ended["state"] != "succeeded" or ended["generation"] != expected:
            raise RuntimeError(f"the registration ended otherwise: {ended}")
        generations[name] = expected
        took = [watch.served(ended["ended_at"]) for watch in watches]
        found.wrong += sum(watch.back for watch in watches)
        if None in took:
            found.never += 1
            continue
        for times, value in zip((found.own, found.other), took, strict=True):
            times.append(value or 0.0)
        found.seconds.append(max(value or 0.0 for value in took))
    return found


def _ended(server: Server, job: str) -> Any:
    deadline = time.monotonic() + _SECONDS
    while True:
        told = server.ask("GET", f"/admin/jobs/{job}")
        if told["ended_at"] is not None or time.monotonic() > deadline:
            return told
        time.sleep(0.02)


class _Watch:
    """A client of one server that asks for one expert until a generation answers, and a little longer."""

    def __init__(self, server: Server, name: str, generation: int) -> None:
        self.back = 0
        self._server, self._name, self._generation = server, name, generation
        self._at: float | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def served(self, ended: float) -> float | None:
        """Seconds from `ended`, of the wall clock, until it answered; None if it never did."""
        self._thread.join()
        return None if self._at is None else max(self._at - ended, 0.0)

    def _run(self) -> None:
        deadline = time.monotonic() + _SECONDS
        body = {"model": self._name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while time.monotonic() < deadline and self._at is None:
                if self._asked(client, body) == self._generation:
                    self._at = time.time()
                time.sleep(_PAUSE_SECONDS)
            if self._at is not None:
                self.back = sum(self._asked(client, body) != self._generation for _ in range(3))

    def _asked(self, client: httpx.Client, body: dict[str, Any]) -> int | None:
        answer = client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return None
        number: int = answer.json()["routing"]["generations"].get(self._name)
        return number
