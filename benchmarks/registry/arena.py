"""One registry that is killed again and again: its server, its load, what was promised, and whether it was kept."""

import contextlib
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from benchmarks.registry.family import PROFILE, RANK, Family
from benchmarks.registry.processes import EXACT, Server, new_postgres
from benchmarks.registry.truth import TOKENS, Truths
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor
from experts.registry.verify import collect_garbage, verify

Victim = Literal["server", "worker", "postgresql"]

_NAMES = tuple(f"expert-{number}" for number in range(6))
_CLIENTS = 2
_KEEP = 3
_HORIZON_SECONDS = (0.8, 0.8, 0.8, 2.5)
"""A kill comes so long after the first submission at most, drawn from these: mostly while registrations run."""

_SETTLE_SECONDS = 90.0
_WATCH_SECONDS = 2.5
_PAUSE_SECONDS = 0.4
"""Between a client's questions: the worker has the lowest priority, and three registries share this machine."""


@dataclass
class Tally:
    """What was promised and what became of it; every number but the first four should be 0.

    Attributes:
        submitted: registrations; `acknowledged` of them succeeded, `failed` ended otherwise and said so.
        answers: of clients, compared with the truth.
        lost: acknowledged generations that were not there, or did not serve, at a later look.
        half: generations that were ready, or answered, without a job that succeeded.
        wrong: answers that are not those of the generation that they name.
        orphans: blobs that nothing needed after garbage collection; `missing` needed ones that were not there.
        findings: of the checker once all was settled.
        stuck: jobs that did not end in time.
        faults: answers of 5xx but 503, and of 4xx for experts that were acknowledged.
        commands: runs of the command line that found fault.
    """

    submitted: int = 0
    acknowledged: int = 0
    failed: int = 0
    answers: int = 0
    lost: int = 0
    half: int = 0
    wrong: int = 0
    orphans: int = 0
    missing: int = 0
    findings: int = 0
    stuck: int = 0
    faults: int = 0
    commands: int = 0
    complaints: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Tally") -> "Tally":
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self

    def __str__(self) -> str:
        told = [
            f"{each.name} {getattr(self, each.name)}" for each in fields(self) if each.name != "complaints"
        ]
        return ", ".join(told) + (f"; {self.complaints[-1][:300]}" if self.complaints else "")


@dataclass
class _Asked:
    """One registration as its client has it.

    Attributes:
        key: for idempotency: it is sent again until its job is known.
        state: as last seen; "" before the job is known.
    """

    key: str
    name: str
    body: Mapping[str, Any]
    version: str
    job: str = ""
    generation: int = 0
    state: str = ""


class Arena:
    """The registry while the block lasts.

    Args:
        family: bundle and fine-tunes.
        asked: prompts that clients ask.
        database: where the catalogue is.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        truths: Truths,
        asked: list[str],
        database: Literal["sqlite", "postgresql"],
    ) -> None:
        self.tally = Tally()
        self._family, self._truths, self._prompts = family, truths, asked
        self._postgres = new_postgres() if database == "postgresql" else None
        state = folder / "state"
        state.mkdir()
        self._settings: dict[str, Any] = {
            **EXACT,
            "bundle": family.bundle,
            "state_dir": state,
            "experts_root": family.root,
            "keep_generations": _KEEP,
            "registration_attempts": 5,
        }
        self._catalogue_url = f"sqlite:///{state}/catalogue.sqlite"
        self._state = state
        self._folder = folder
        self._ledger: list[_Asked] = []
        self._heard: set[tuple[str, int, str, tuple[int, ...]]] = set()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._clients: list[threading.Thread] = []

    @property
    def victims(self) -> dict[Victim, float]:
        """What can be killed here, and how often."""
        if self._postgres is None:
            return {"server": 1, "worker": 1}
        # Servers and workers take seconds of imports to come back.
        return {"server": 0.2, "worker": 0.25, "postgresql": 0.55}

    def environment(self) -> dict[str, str]:
        """Of the command line on this registry."""
        told = {"bundle": self._family.bundle, "state_dir": self._state, "keep_generations": _KEEP}
        if self._postgres is not None:
            told["catalogue"] = self._catalogue_url
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TWINSERVE_")}
        return clean | {f"TWINSERVE_{name.upper()}": str(value) for name, value in told.items()}

    def __enter__(self) -> Self:
        if self._postgres is not None:
            self._postgres.start()
            self._catalogue_url = self._postgres.database()
            self._settings["catalogue"] = self._catalogue_url
        self.server = Server(self._settings, self._folder)
        self.server.start()
        for number in range(_CLIENTS):
            client = threading.Thread(target=self._load, args=(random.Random(number),), daemon=True)
            self._clients.append(client)
            client.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        for client in self._clients:
            client.join(30)
        self.server.close()
        if self._postgres is not None:
            self._postgres.remove()

    # -- one round ----------------------------------------------------------------------------------

    def round(self, victim: Victim, draw: random.Random) -> float:
        """Submit, kill at a random moment, bring back, settle, check; seconds from the kill until all was settled."""
        begun = [self._new(name, draw) for name in draw.sample(_NAMES, draw.randint(1, 3))]
        operator = threading.Thread(target=self._submit_all, args=(begun,))
        operator.start()
        time.sleep(draw.uniform(0, draw.choice(_HORIZON_SECONDS)))
        killed = time.monotonic()
        self._kill(victim, draw)
        operator.join()
        if not self.server.alive:
            self.server.start()
        self._settle()
        recovered = time.monotonic() - killed
        self.check()
        return recovered

    def _new(self, name: str, draw: random.Random) -> _Asked:
        version = draw.choice([name for name in self._family.versions if name.startswith("v")])
        body: dict[str, Any] = {"name": name, "path": version, "replace": True, "rank": RANK}
        if draw.random() < 0.5:
            body["prompts"] = PROFILE
        asked = _Asked(secrets.token_hex(8), name, body, version)
        self._ledger.append(asked)
        self.tally.submitted += 1
        return asked

    def _submit_all(self, begun: list[_Asked]) -> None:
        for asked in begun:
            with contextlib.suppress(httpx.HTTPError):
                self._submit(asked)

    def _submit(self, asked: _Asked) -> None:
        answer = self.server.admin.post(
            "/admin/experts", json=asked.body, headers={"Idempotency-Key": asked.key}
        )
        if answer.status_code == 202:
            told = answer.json()
            asked.job, asked.generation, asked.state = told["id"], told["generation"], told["state"]
        elif answer.status_code != 503:
            self._complain("faults", f"{asked.body}: {answer.status_code} {answer.text[:300]}")

    def _kill(self, victim: Victim, draw: random.Random) -> None:
        if victim == "server":
            self.server.kill()
        elif victim == "worker":
            deadline = time.monotonic() + 30
            while not (workers := self.server.workers()) and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(draw.choice(workers), signal.SIGKILL)
        else:
            assert self._postgres is not None
            self._postgres.kill()
            time.sleep(draw.uniform(0, 0.5))
            self._postgres.start()

    def _settle(self) -> None:
        """Every registration has a job, every job an end, and only replicas that live are known."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                for asked in self._ledger:
                    if not asked.job:
                        self._submit(asked)
                    elif asked.state in ("queued", "running"):
                        asked.state = self.server.ask("GET", f"/admin/jobs/{asked.job}")["state"]
                known = self.server.ask("GET", "/admin/registry")
                alone = [replica["id"] for replica in known["replicas"]] == [known["replica"]]
                open_ = [asked for asked in self._ledger if asked.state in ("", "queued", "running")]
                if alone and not open_ and known["served_revision"] == known["revision"]:
                    return
            time.sleep(0.1)
        for asked in self._ledger:
            if asked.state in ("", "queued", "running"):
                self._complain("stuck", f"{asked}")
                asked.state = "stuck"

    # -- what must hold -----------------------------------------------------------------------------

    def check(self) -> None:
        """Compare what is there with what was promised, collect garbage, and have the checker look."""
        self.tally.acknowledged = sum(asked.state == "succeeded" for asked in self._ledger)
        self.tally.failed = sum(asked.state in ("failed", "cancelled") for asked in self._ledger)
        for name in _NAMES:
            self._check_expert(name, [asked for asked in self._ledger if asked.name == name])
        for name in ("alpha", "beta"):
            self._check_answer(name, 1, name)
        self._check_heard()
        self._check_files()

    def _check_expert(self, name: str, asked: list[_Asked]) -> None:
        promised = {each.generation: each for each in asked if each.state == "succeeded"}
        answer = self.server.admin.get(f"/admin/experts/{name}/generations", params={"limit": 1000})
        if answer.status_code == 404:
            there: dict[int, Any] = {}
        else:
            there = {each["generation"]: each for each in answer.raise_for_status().json()["data"]}
        for number, each in there.items():
            if each["state"] in ("ready", "collected") and number not in promised:
                self._complain("half", f"{name}@{number} is {each['state']}: {each}")
        kept = sorted(promised)[-_KEEP:]
        for number in promised:
            state = there.get(number, {}).get("state")
            if state != "ready" and not (state == "collected" and number not in kept):
                self._complain("lost", f"{name}@{number} is {state}")
        if promised:
            newest = max(promised)
            if not there.get(newest, {}).get("serving"):
                self._complain("lost", f"{name}@{newest} does not serve: {there.get(newest)}")
            self._check_answer(name, newest, promised[newest].version)

    def _check_answer(self, name: str, generation: int, version: str) -> None:
        prompt = self._prompts[self.tally.answers % len(self._prompts)]
        said = self.server.ask("POST", "/v1/completions", _question(name, prompt))
        self.tally.answers += 1
        tokens = tuple(said["choices"][0]["token_ids"])
        if said["routing"]["generations"] != {name: generation}:
            self._complain("lost", f"{name}@{generation} should answer: {said['routing']}")
        elif tokens != self._truths.tokens(((version, 1.0),), prompt):
            self._complain("wrong", f"{name}@{generation} ({version}) says {tokens} to {prompt!r}")

    def _check_heard(self) -> None:
        """What clients were told meanwhile."""
        versions = {(each.name, each.generation): each for each in self._ledger if each.generation}
        with self._lock:
            heard, self._heard = self._heard, set()
        for name, generation, prompt, tokens in heard:
            self.tally.answers += 1
            asked = versions.get((name, generation))
            if asked is None or asked.state != "succeeded":
                self._complain("half", f"{name}@{generation} answered, and its job is {asked}")
            elif tokens != self._truths.tokens(((asked.version, 1.0),), prompt):
                self._complain("wrong", f"{name}@{generation} ({asked.version}) said {tokens} to {prompt!r}")

    def _check_files(self) -> None:
        catalogue = Catalogue.open(self._catalogue_url)
        blobs = Blobs.open(str(self._state / "blobs"), self._folder / "checker")
        try:
            collect_garbage(catalogue, blobs, _KEEP, Actor("benchmark"))
            needed, stored = set(catalogue.referenced()), {blob.sha256 for blob in blobs.list()}
            for sha256 in stored - needed:
                self._complain("orphans", f"nothing needs {sha256}")
            for sha256 in needed - stored:
                self._complain("missing", f"{sha256} is not stored")
            for finding in verify(catalogue, blobs, watch_seconds=_WATCH_SECONDS).found:
                self._complain("findings", f"{finding}")
        finally:
            blobs.close()
            catalogue.close()

    def _complain(self, what: str, how: str) -> None:
        setattr(self.tally, what, getattr(self.tally, what) + 1)
        self.tally.complaints.append(f"{what}: {how}")
        print(f"{self._folder.name}: {what}: {how}", flush=True)

    # -- load ---------------------------------------------------------------------------------------

    def _load(self, draw: random.Random) -> None:
        """A client that asks until the end, whatever becomes of the server."""
        with httpx.Client(base_url=self.server.url, timeout=30) as client:
            while not self._ending.is_set():
                sure = {asked.name for asked in self._ledger if asked.state == "succeeded"}
                name, prompt = draw.choice(_NAMES), draw.choice(self._prompts)
                try:
                    answer = client.post("/v1/completions", json=_question(name, prompt))
                except httpx.HTTPError:
                    self._ending.wait(0.1)
                    continue
                if answer.status_code == 200:
                    said = answer.json()
                    tokens = tuple(said["choices"][0]["token_ids"])
                    with self._lock:
                        for generation in said["routing"]["generations"].values():
                            self._heard.add((name, generation, prompt, tokens))
                elif answer.status_code >= 400 and answer.status_code not in (503, 404):
                    self._complain("faults", f"{name}: {answer.status_code} {answer.text[:300]}")
                elif answer.status_code == 404 and name in sure:
                    self._complain("lost", f"{name}: {answer.text[:300]}")
                self._ending.wait(_PAUSE_SECONDS)


def _question(name: str, prompt: str) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
