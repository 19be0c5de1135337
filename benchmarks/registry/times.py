"""How long registrations take on the embedded bundle, from POST until the expert serves."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.registry.large import make_full, make_lora
from benchmarks.registry.processes import Server

_PROMPTS = [f"Conjugate the verb number {number} in the past tense." for number in range(16)]
_WARM_SECONDS = 15.0
"""The spare process imports what it needs at the lowest priority, before anybody registers."""


@dataclass
class Taken:
    """Seconds of each registration, in their order."""

    lora: list[float] = field(default_factory=list)
    lora_with_prompts: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)


def run(bundle: Path, count: int) -> Taken:
    """So many registrations of each kind, each of other weights and another name."""
    taken = Taken()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = folder / "fine-tunes"
        for number in range(2 * count):
            make_lora(root / f"lora-{number}", bundle / "shared", number)
        settings = {"bundle": bundle.absolute(), "state_dir": folder / "state", "experts_root": root}
        with Server(settings, folder) as server:
            time.sleep(_WARM_SECONDS)
            for number in range(count):
                taken.lora.append(_register(server, f"lora-{number}"))
                taken.lora_with_prompts.append(_register(server, f"lora-{count + number}", _PROMPTS))
            for number in range(count):
                make_full(root / f"full-{number}", bundle / "shared", number)
                taken.full.append(_register(server, f"full-{number}"))
    return taken


def _register(server: Server, name: str, prompts: list[str] | None = None) -> float:
    """Seconds until its first answer; the expert is retired afterwards, so that the family stays as it was."""
    began = time.monotonic()
    body = {"name": name, "path": name, **({"prompts": prompts} if prompts else {})}
    server.ask("POST", "/admin/experts?wait=300", body)
    took = time.monotonic() - began
    asked = {"model": name, "prompt": "Hello", "max_tokens": 2, "temperature": 0}
    said = server.ask("POST", "/v1/completions", asked)
    if said["routing"]["generations"] != {name: 1}:
        raise RuntimeError(f"{name} does not serve: {said['routing']}")
    server.ask("DELETE", f"/admin/experts/{name}")
    return took
