"""The figures of `results/api.json`: what the four parts showed, and what each is held against."""

from pathlib import Path

from benchmarks.api.clients import Counted
from benchmarks.api.connections import Held
from benchmarks.api.schema import Thrown
from benchmarks.api.soak import Soaked
from benchmarks.report import Figure

RESULTS = Path("benchmarks/results/api.json")
TITLE = "API"
PARTS = ("contract", "schemathesis", "connections", "soak")

_MIB = 2**20
_GROWTH_MIB = 256
"""Memory that 2,000 connections may take: an eighth of a MiB each."""

_SLOPE_MIB = 0.5
"""Memory a minute: what a sampled line through a quiet process shows by chance, and no more."""


def command_of(part: str) -> str:
    """What makes a part's figures again."""
    return f"python -m benchmarks.api {part}"


def of_contract(found: dict[str, Counted], command: str) -> list[Figure]:
    """Tests that passed, by client; how far lm-eval's two ways differ."""
    made = []
    for client, counted in found.items():
        note = f"{counted.failed} failed, {counted.skipped} skipped"
        made.append(
            Figure(
                f"contract tests passed: {client}", counted.passed, "tests", "higher", counted.tests, command,
                at_least=counted.tests, note=note,
            )
        )  # fmt: skip
        if "largest_difference" in counted.properties:
            made.append(
                Figure(
                    "lm-eval, local-completions against HF: largest difference of a log-likelihood",
                    counted.properties["largest_difference"], "nat", "lower", counted.tests, command,
                    at_least=2e-3, note="float32; scores and greedy flags are equal",
                )
            )  # fmt: skip
    return made


def of_schemathesis(found: Thrown, command: str) -> list[Figure]:
    """Cases, failures, and answers of 5xx among them."""
    failures = ", ".join(f"{name}: {count}" for name, count in found.failures.most_common()) or "none"
    n = found.cases
    return [
        Figure(
            "schemathesis: cases", n, "cases", "higher", found.operations, command,
            note=f"{found.operations} operations, {found.links} links, {found.seconds:.0f} s; of the cases that fit "
            f"the document {found.accepted} were accepted, {found.refused} refused",
        ),
        Figure("schemathesis: failures", found.failures.total(), "failures", "lower", n, command, 0, note=failures),
        Figure("schemathesis: answers of 5xx", found.server_errors, "answers", "lower", n, command, 0),
    ]  # fmt: skip


def of_connections(found: Held, command: str) -> list[Figure]:
    """What was held together, lost, mixed up, and what it took."""
    n = found.count
    told = "; ".join(found.complaints)
    name = f"{n:,} concurrent connections: "
    return [
        Figure(
            name + "running or queued at one moment", found.together, "requests", "higher", n, command, n,
            note=f"half of them streams; all answered {found.seconds:.0f} s after the first was sent",
        ),
        Figure(name + "lost answers", found.lost, "answers", "lower", n, command, 0, note=told),
        Figure(
            name + "mixed or wrong answers", found.wrong, "answers", "lower", n, command, 0,
            note=f"{found.distinct} distinct right ones, each known from asking alone",
        ),
        Figure(
            name + "memory at most, over idle", found.growth / _MIB, "MiB", "lower", n, command, _GROWTH_MIB,
            note=f"idle {found.before.resident / _MIB:.0f} MiB, at most {found.peak / _MIB:.0f} MiB",
        ),
    ]  # fmt: skip


def of_soak(found: Soaked, command: str) -> list[Figure]:
    """Exchanges, wrong answers, what is left, and the slope of memory."""
    n = found.exchanges
    name = f"soak of {found.seconds / 60:g} min with random cancels: "
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.done.most_common())
    left = ", ".join(f"{kind} {count:+d}" for kind, count in found.leaks.items())
    leaked = sum(max(count, 0) for count in found.leaks.values())
    return [
        Figure(name + "exchanges", n, "exchanges", "higher", 1, command, note=kinds),
        Figure(
            name + "wrong or failed answers", len(found.wrong), "answers", "lower", n, command, 0,
            note="; ".join(found.wrong[:3])[:500],
        ),
        Figure(name + "left behind", leaked, "things", "lower", n, command, 0, note=left),
        Figure(
            name + "slope of memory", found.slope * 60 / _MIB, "MiB/min", "lower", n, command, _SLOPE_MIB,
            note=f"least squares after the first {found.warm_seconds:.0f} s; "
            f"{found.before.resident / _MIB:.0f} MiB idle before, {found.after.resident / _MIB:.0f} after; "
            f"{found.after.objects - found.before.objects:+d} Python objects",
        ),
    ]  # fmt: skip
