"""kill -9 of server, worker and PostgreSQL at random moments of registrations under load, and what is left then."""

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.registry.arena import Arena, Tally
from benchmarks.registry.family import make_family, prompts
from benchmarks.registry.truth import Truths

_SECONDS = 17 * 60
"""No round begins later; a run that gets no further says so by its number of kills."""


@dataclass
class Killed:
    """What a run showed.

    Attributes:
        kills: by victim.
        tally: all arenas together.
        seconds: of the whole run.
    """

    kills: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)
    recovery: list[float] = field(default_factory=list)
    seconds: float = 0.0


def run(count: int) -> Killed:
    """So many kills, in three registries at once: two on PostgreSQL, one on SQLite."""
    began = time.monotonic()
    found, lock = Killed(), threading.Lock()
    few = count // 5
    left = {
        "postgresql-1": (count - few) // 2,
        "postgresql-2": count - few - (count - few) // 2,
        "sqlite": few,
    }
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(left)) as pool:
        # One after the other: transformers loads no two models at once.
        arenas = [_prepared(Path(scratch, name), name, number) for number, name in enumerate(left)]
        running = [
            pool.submit(_fight, arena, name, kills, began + _SECONDS, found, lock)
            for arena, (name, kills) in zip(arenas, left.items(), strict=True)
        ]
        for each in running:
            each.result()
    found.seconds = time.monotonic() - began
    return found


def _prepared(folder: Path, name: str, seed: int) -> Arena:
    folder.mkdir()
    family = make_family(folder / "family", ("alpha", "beta"), 4, seed)
    truths = Truths(family.bundle / "shared", family.base, family.versions)
    asked = truths.clear_prompts(prompts(60, seed), 3)
    return Arena(folder, family, truths, asked, "sqlite" if name == "sqlite" else "postgresql")


def _fight(
    prepared: Arena, name: str, kills: int, deadline: float, found: Killed, lock: threading.Lock
) -> None:
    """One registry from its first start to its last check. On a thread of its own: its children end with it."""
    draw = random.Random(name)
    with prepared as arena:
        arena.check()
        for number in range(kills):
            if time.monotonic() > deadline:
                break
            (victim,) = draw.choices(list(arena.victims), list(arena.victims.values()))
            recovered = arena.round(victim, draw)
            with lock:
                found.kills[victim] += 1
                found.recovery.append(recovered)
                print(
                    f"{name}: {number + 1} of {kills}, {victim}, {recovered:.1f} s; {arena.tally}", flush=True
                )
        arena.tally.commands += _command(arena, "gc") + _command(arena, "verify")
    with lock:
        found.tally += arena.tally


def _command(arena: Arena, word: str) -> int:
    """1 if `twinserve registry …` finds fault."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "registry", word, "--json"],
        env=arena.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"twinserve registry {word}: {done.stdout[-1000:]}{done.stderr[-1000:]}", flush=True)
    return int(done.returncode != 0)
