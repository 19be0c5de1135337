"""What a check found, and what was done about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from experts.errors import ExpertsError

Kind = Literal[
    "missing_blob",
    "corrupt_blob",
    "orphan_blob",
    "leftover",
    "stuck_generation",
    "dead_replica",
    "lost_job",
    "stale_pin",
    "active_generation",
    "trial",
    "alias",
    "router",
    "unreadable",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that should not be.

    Attributes:
        subject: what it is about: `expert a@3`, `blob 3f…`, `job job-…`.
        problem: what is wrong, and how a person can mend it.
        mended: what was done about it; None for nothing.
    """

    kind: Kind
    subject: str
    problem: str
    mended: str | None = None

    def by(self, done: str) -> "Finding":
        """The same, mended."""
        return replace(self, mended=done)

    def despite(self, error: Exception) -> "Finding":
        """The same, where mending failed."""
        return replace(self, problem=f"{self.problem}; mending it failed: {error}")


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of one check.

    Attributes:
        revision: the catalogue's when the check began.
        blobs: how many the catalogue needs; `nbytes` of them together.
    """

    revision: int
    blobs: int
    nbytes: int
    found: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Nothing is left that should not be."""
        return all(finding.mended is not None for finding in self.found)


def mend(finding: Finding, done: str, act: Callable[[], Any], *, repair: bool) -> Finding:
    """The finding, after `act` if it is to be mended."""
    if not repair:
        return finding
    try:
        act()
    except ExpertsError as error:
        return finding.despite(error)
    return finding.by(done)
