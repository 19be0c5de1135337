"""Experts replaced all the time under clients that ask all the time: each answer is that of what it names."""

import asyncio
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.registry.family import PROFILE, RANK, Family, make_family, prompts
from benchmarks.registry.processes import EXACT, Server
from benchmarks.registry.truth import TOKENS, Mix, Truths

_EXPERTS = tuple(f"expert-{number:02d}" for number in range(20))
_BUILT = ("alpha", "beta")
_CLIENTS = 32
_VERSIONS = 6
_PROMPTS = 4
_THINK_SECONDS = 0.4
"""Between a client's questions in the mean: registrations have the lowest priority, and shall go on."""

_KINDS = ("one expert", "two experts", "routed")


@dataclass
class Isolated:
    """What a run showed.

    Attributes:
        answers: by kind, each compared with the truth; `truths` of them are different.
        wrong: not what the generations that it names say.
        undecided: differ where the truth's own two likeliest tokens are equal but for rounding.
        unknown: named a generation that nobody registered, or another expert than was asked for.
        stale: named a generation that had been replaced before the question was sent.
        failed: answers that were none.
        replaced: generations that went live meanwhile; `named` different ones were named by answers.
    """

    seconds: float
    answers: Counter[str] = field(default_factory=Counter)
    truths: int = 0
    wrong: int = 0
    undecided: int = 0
    unknown: int = 0
    stale: int = 0
    failed: int = 0
    replaced: int = 0
    named: int = 0
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Heard:
    """One answer.

    Attributes:
        sent: when it was asked for, monotonic.
    """

    kind: str
    asked: str
    prompt: str
    tokens: tuple[int, ...]
    gates: tuple[tuple[str, float], ...]
    generations: Mapping[str, int]
    sent: float


class _Operator:
    """Replaces one expert after the other, and remembers which fine-tune each generation is."""

    def __init__(self, server: Server, seed: int) -> None:
        self.versions: dict[tuple[str, int], str] = {}
        self.since: dict[tuple[str, int], float] = {}
        self.complaints: list[str] = []
        self._server = server
        self._draw = random.Random(seed)

    def register(self, name: str) -> None:
        """One generation, live when this returns."""
        version = f"v{self._draw.randrange(_VERSIONS)}"
        body = {"name": name, "path": version, "replace": True, "rank": RANK}
        if self._draw.random() < 0.5:
            body["prompts"] = PROFILE
        told = self._server.ask("POST", "/admin/experts?wait=120", body)
        self.versions[name, told["new_generation"]] = version
        self.since[name, told["new_generation"]] = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Until told to stop."""
        while not stop.is_set():
            for name in self._draw.sample(_EXPERTS, len(_EXPERTS)):
                if stop.is_set():
                    return
                try:
                    self.register(name)
                except (RuntimeError, httpx.HTTPError) as error:
                    self.complaints.append(f"{name}: {error}")


def run(seconds: float) -> Isolated:
    """Replace and ask for so long."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        family = make_family(folder / "family", _BUILT, _VERSIONS)
        truths = Truths(family.bundle / "shared", family.base, family.versions)
        asked = truths.clear_prompts(prompts(80), _PROMPTS)
        settings = {
            **EXACT,
            "bundle": family.bundle,
            "state_dir": folder / "state",
            "experts_root": family.root,
            "max_batch": _CLIENTS,
        }
        with Server(settings, folder) as server:
            return _measure(server, family, truths, asked, seconds)


def _measure(server: Server, family: Family, truths: Truths, asked: list[str], seconds: float) -> Isolated:
    operator = _Operator(server, seed=1)
    for name in _BUILT:
        operator.versions[name, 1] = name
    for name in _EXPERTS:
        operator.register(name)
    before = len(operator.versions)
    stop = threading.Event()
    replacing = threading.Thread(target=operator.run, args=(stop,))
    replacing.start()
    found = Isolated(seconds)
    try:
        heard = asyncio.run(_clients(server.url, family, asked, seconds, found))
    finally:
        stop.set()
        replacing.join()
    found.replaced = len(operator.versions) - before
    found.complaints += operator.complaints
    found.failed += len(operator.complaints)
    _compare(heard, operator, truths, found)
    return found


async def _clients(
    url: str, family: Family, asked: list[str], seconds: float, found: Isolated
) -> list[_Heard]:
    heard: list[_Heard] = []
    deadline = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def ask_on(draw: random.Random) -> None:
            while time.monotonic() < deadline:
                one = await _ask(client, draw, asked, found)
                if one is not None:
                    heard.append(one)
                await asyncio.sleep(draw.uniform(0, 2 * _THINK_SECONDS))

        await asyncio.gather(*(ask_on(random.Random(number)) for number in range(_CLIENTS)))
    return heard


async def _ask(
    client: httpx.AsyncClient, draw: random.Random, asked: list[str], found: Isolated
) -> _Heard | None:
    kind = draw.choices(_KINDS, (6, 2, 2))[0]
    prompt = draw.choice(asked)
    body: dict[str, Any] = {
        "model": "family",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if kind == "one expert":
        body["model"] = draw.choice(_EXPERTS)
    elif kind == "two experts":
        body["gates"] = dict(
            zip(draw.sample(_EXPERTS, 2), draw.choice(((0.5, 0.5), (0.75, 0.25))), strict=True)
        )
    sent = time.monotonic()
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        found.failed += 1
        found.complaints.append(repr(error))
        return None
    if answer.status_code != 200:
        found.failed += 1
        found.complaints.append(f"{body}: {answer.status_code} {answer.text[:300]}")
        return None
    told = answer.json()
    return _Heard(
        kind,
        body["model"],
        prompt,
        tuple(told["choices"][0]["token_ids"]),
        tuple(sorted(told["routing"]["gates"].items())),
        told["routing"]["generations"],
        sent,
    )


def _compare(heard: list[_Heard], operator: _Operator, truths: Truths, found: Isolated) -> None:
    started = truths.known()
    named = set()
    # Sorted by what they are mixed of, so that each mix is written into the weights once.
    mixes = [(_mix(one, operator), one) for one in heard]
    for mix, one in sorted(mixes, key=lambda pair: (pair[0] or (), pair[1].prompt)):
        found.answers[one.kind] += 1
        named |= set(one.generations.items())
        if mix is None or (one.kind == "one expert" and tuple(one.generations) != (one.asked,)):
            found.unknown += 1
            found.complaints.append(f"unknown: {one}")
            continue
        if any(_newest(operator, name, one.sent) > number for name, number in one.generations.items()):
            found.stale += 1
            found.complaints.append(f"stale: {one}")
        if one.tokens == truths.tokens(mix, one.prompt):
            continue
        if truths.clear(mix, one.prompt):
            found.wrong += 1
            found.complaints.append(f"wrong: {one}, which is {mix}: {truths.tokens(mix, one.prompt)}")
        else:
            found.undecided += 1
    found.truths = truths.known() - started
    found.named = len(named)


def _mix(one: _Heard, operator: _Operator) -> Mix | None:
    """Fine-tunes and gates of what an answer names; None where it names what was never registered."""
    gates: Counter[str] = Counter()
    for name, gate in one.gates:
        version = operator.versions.get((name, one.generations.get(name, 0)))
        if version is None:
            return None
        gates[version] += gate  # type: ignore[assignment]
    return tuple(sorted(gates.items()))


def _newest(operator: _Operator, name: str, sent: float) -> int:
    """The newest generation that was known to be live when a question was sent."""
    return max(
        (number for (each, number), since in operator.since.items() if each == name and since < sent),
        default=0,
    )
