"""What every section of the suite is given."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks.report import Figure


@dataclass(frozen=True, slots=True)
class Context:
    """What a section is given.

    Attributes:
        bundle: the embedded bundle.
        work: the folder of peers and of other models.
        command: what makes the section's figures again.
        rounds: paired runs of every cell.
        smoke: tiny counts, to see that everything runs; such figures mean nothing.
    """

    bundle: Path
    work: Path
    command: str
    rounds: int
    smoke: bool
    log: Console

    def size(self, wanted: int, tiny: int) -> int:
        """A count, or the tiny one where only a smoke test is wanted."""
        return tiny if self.smoke else wanted

    def batches(self, *wanted: int) -> tuple[int, ...]:
        """Batch sizes; only the smallest in a smoke test."""
        return wanted[:1] if self.smoke else wanted

    def figure(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        better: Literal["higher", "lower"] = "lower",
        *,
        at_least: float | None = None,
        aim: float | None = None,
        note: str = "",
    ) -> Figure:
        """The median of what paired rounds gave."""
        value = statistics.median(values)
        self.log.print(f"  {name}: {value:.3g} {unit}  {note}", highlight=False)
        return Figure(name, value, unit, better, len(values), self.command, at_least, aim, note)

    def missing(
        self,
        name: str,
        unit: str,
        better: Literal["higher", "lower"],
        why: str,
        *,
        at_least: float | None = None,
        aim: float | None = None,
    ) -> Figure:
        """What could not be measured here, and why."""
        self.log.print(f"  {name}: not measured: {why}", highlight=False)
        return Figure(name, None, unit, better, 0, self.command, at_least, aim, why)
