"""The figures of `results/registry.json`: what the sections showed, and what each is held against."""

import statistics
from pathlib import Path

from benchmarks.paired import percentile
from benchmarks.registry.convergence import Converged
from benchmarks.registry.isolation import Isolated
from benchmarks.registry.kills import Killed
from benchmarks.registry.swap import Swapped
from benchmarks.registry.times import Taken
from benchmarks.registry.tokens import Kind, Noticed
from benchmarks.report import Figure

RESULTS = Path("benchmarks/results/registry.json")
TITLE = "Registry"
SECTIONS = ("kills", "isolation", "convergence", "times", "tokens", "swap")

_KILLS = 200
_ZEROS = {
    "lost": "acknowledged registrations that were lost or did not serve",
    "half": "experts published by half: ready or answering without a registration that succeeded",
    "wrong": "answers that are not those of the generation that they name",
    "orphans": "blobs that nothing needs, after garbage collection",
    "missing": "blobs that the catalogue needs and the store has not",
    "findings": "findings of the checker once all was settled",
    "stuck": "registrations without an end",
    "faults": "answers of 5xx (but 503), or of 4xx without a fault of the client",
    "commands": "runs of `twinserve registry gc` and `verify` that found fault",
}


def command_of(section: str) -> str:
    """What makes a section's figures again."""
    return f"python -m benchmarks.registry {section}"


def of_kills(found: Killed, command: str) -> list[Figure]:
    """Kills, and what was lost or mixed up by them."""
    tally, n = found.tally, found.kills.total()
    kinds = ", ".join(f"{victim} {count}" for victim, count in sorted(found.kills.items()))
    made = [
        Figure(
            "kill -9 at random moments of registrations under load", n, "kills", "higher", n, command, _KILLS,
            note=f"{kinds}; two registries on PostgreSQL, one on SQLite; "
            f"settled {statistics.median(found.recovery or [0]):.1f} s after a kill in the median, "
            f"{max(found.recovery, default=0):.0f} s at most; {found.seconds / 60:.0f} min",
        ),
        Figure(
            "registrations acknowledged among the kills", tally.acknowledged, "registrations", "higher",
            tally.submitted, command, note=f"{tally.failed} of {tally.submitted} failed and said so",
        ),
        Figure(
            "answers compared with the truth among the kills", tally.answers, "answers", "higher",
            tally.answers, command,
        ),
    ]  # fmt: skip
    for field, meaning in _ZEROS.items():
        told = "; ".join(each for each in tally.complaints if each.startswith(f"{field}:"))[:500]
        made.append(
            Figure(f"kills: {meaning}", getattr(tally, field), "", "lower", n, command, at_least=0, note=told)
        )
    return made


def of_isolation(found: Isolated, command: str) -> list[Figure]:
    """Answers checked, and those that were not what they should be."""
    n = found.answers.total()
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.answers.items())
    name = f"20 experts replaced for {found.seconds / 60:g} min under 32 clients: "
    told = "; ".join(found.complaints[:3])[:500]
    return [
        Figure(
            name + "answers checked", n, "answers", "higher", n, command,
            note=f"{kinds}; {found.truths} different truths, each from plain transformers on merged weights",
        ),
        Figure(
            name + "generations put live", found.replaced, "generations", "higher", found.replaced, command,
            note=f"{found.named} different ones were named by answers",
        ),
        Figure(
            name + "answers that are not what their generations say", found.wrong, "answers", "lower", n, command, 0,
            note=f"{found.undecided} more differ where the truth's two likeliest tokens differ by rounding only",
        ),
        Figure(
            name + "answers of unknown generations or other experts", found.unknown, "answers", "lower", n, command,
            0, note=told,
        ),
        Figure(
            name + "answers of a generation replaced before the question", found.stale, "answers", "lower", n,
            command, 0,
        ),
        Figure(name + "failed requests", found.failed, "requests", "lower", n, command, 0, note=told),
    ]  # fmt: skip


def of_convergence(found: Converged, command: str) -> list[Figure]:
    """From the commit until both servers answer with it."""
    n = len(found.seconds)
    name = "two servers, one PostgreSQL, one object store: "
    note = (
        f"the registering server {percentile(found.own, 0.5):.3f} s, the other {percentile(found.other, 0.5):.3f} s "
        f"in the median; {max(found.seconds):.3f} s at most; new names and replacements in turn"
    )
    return [
        Figure(
            name + "registered on one, served by both, p99", percentile(found.seconds, 0.99), "s", "lower", n,
            command, 2.0, 0.5, note,
        ),
        Figure(
            name + "the same, p50", percentile(found.seconds, 0.5), "s", "lower", n, command, 2.0, 0.25,
        ),
        Figure(
            name + "generations not served within a minute", found.never, "", "lower", n + found.never, command, 0,
        ),
        Figure(
            name + "answers that went back to an older generation", found.wrong, "answers", "lower", n, command, 0,
        ),
    ]  # fmt: skip


def of_times(found: Taken, command: str) -> list[Figure]:
    """The slowest of each kind."""
    kinds = (
        ("LoRA of rank 16 on the embedded base", found.lora, 3.0, 1.5),
        ("the same with 16 prompts", found.lora_with_prompts, 3.0, 1.5),
        ("full fine-tune of 135M parameters", found.full, 30.0, 15.0),
    )
    return [
        Figure(
            f"registration: {kind}, POST until it serves, slowest", max(taken), "s", "lower", len(taken), command,
            bound, aim, note=f"median {statistics.median(taken):.2f} s, fastest {min(taken):.2f} s",
        )
        for kind, taken, bound, aim in kinds
    ]  # fmt: skip


def of_tokens(found: dict[Kind, Noticed], command: str) -> list[Figure]:
    """Ratios of p99."""
    words = {"lora": "LoRAs", "full": "full fine-tunes"}
    return [
        Figure(
            f"p99 inter-token of 8 streams while {words[kind]} are registered one after the other / without",
            statistics.median(noticed.ratios), "x time", "lower", len(noticed.ratios), command, 1.2, 1.05,
            note=f"{_ms(noticed.during)} and {_ms(noticed.without)} ms; "
            f"ratios {min(noticed.ratios):.2f} to {max(noticed.ratios):.2f}; {noticed.begun} registrations "
            f"were begun, {noticed.registered} ended meanwhile",
        )
        for kind, noticed in found.items()
    ]  # fmt: skip


def of_swap(found: Swapped, command: str) -> list[Figure]:
    """What a swap costs those that run."""
    n = len(found.seconds)
    ratios = [b / a for a, b in zip(found.without, found.during, strict=True)]
    name = "another bundle takes over under 8 streams: "
    return [
        Figure(
            name + "requests that failed or broke off", found.failed, "requests", "lower", found.asked, command, 0,
            note=f"{n} swaps; every token of every stream came too; the rebuild before took {found.rebuilt:.0f} s",
        ),
        Figure(
            name + "until new requests go there", statistics.median(found.seconds), "s", "lower", n, command,
            note=f"{max(found.seconds):.1f} s at most",
        ),
        Figure(
            name + "p99 inter-token / without", statistics.median(ratios), "x time", "lower", n, command,
            note=f"{_ms(found.during)} and {_ms(found.without)} ms; ratios {min(ratios):.2f} to {max(ratios):.2f}",
        ),
        Figure(
            name + "longest gap between two tokens", max(found.longest), "s", "lower", n, command,
            note=f"{statistics.median(found.longest):.2f} s in the median of the swaps",
        ),
    ]  # fmt: skip


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f}"
