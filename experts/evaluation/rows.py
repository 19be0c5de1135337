"""Cells → rows: what a system with chosen hyper-parameters scored, divided by what tables divide by. Pure."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from experts.evaluation.jobs import REFERENCE
from experts.evaluation.store import Cell, Store
from experts.evaluation.systems import System, describe

_SYSTEM: TypeAdapter[System] = TypeAdapter(System)


@dataclass(frozen=True)
class Mean:
    """A normalised mean in %, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.error:.1f}"


@dataclass(frozen=True)
class Row:
    """One system on some tasks' test questions.

    Attributes:
        experts: those that it was made of.
        cells: task → what was measured.
    """

    study: str
    setting: str
    name: str
    experts: tuple[str, ...]
    seed: int
    system: Mapping[str, Any]
    cells: Mapping[str, Cell]

    @property
    def settings(self) -> str:
        """Every hyper-parameter, on one line."""
        return describe(_SYSTEM.validate_python(dict(self.system)))

    @property
    def items(self) -> int:
        """The fewest items of a task."""
        return min(cell.score.count for cell in self.cells.values())

    def fact(self, name: str) -> float:
        """The largest value of a fact over the tasks; 0 where it is not known."""
        return max((float(cell.facts.get(name, 0.0)) for cell in self.cells.values()), default=0.0)

    def routed(self, tasks: Iterable[str]) -> tuple[int, int, int]:
        """Questions of these tasks routed to the task's own expert, to no expert, and all."""
        right = silent = total = 0
        for task in tasks:
            counts = self.cells[task].facts.get("routed", {}) if task in self.cells else {}
            right, silent = right + counts.get(task, 0), silent + counts.get("", 0)
            total += sum(counts.values())
        return right, silent, total


class Yardsticks:
    """Test cells of base and experts alone."""

    def __init__(self, store: Store) -> None:
        self._cells: dict[tuple[str, str, str], dict[int, Cell]] = {}
        for cell in store.cells(study=REFERENCE, split="test"):
            about = cell.parameters
            key = about["setting"], about["row"], about["task"]
            self._cells.setdefault(key, {})[cell.score.count] = cell

    def of(self, setting: str, kind: str, task: str, count: int) -> Cell | None:
        """The one over as many items, else over the most."""
        found = self._cells.get((setting, kind, task), {})
        return found.get(count) or (found[max(found)] if found else None)

    def ratios(self, row: Row, kind: str, tasks: Iterable[str]) -> dict[str, Mean]:
        """Task → score in % of the yardstick's; without the tasks where that is 0 or not known, or is of as many
        questions that are others.
        """
        found = {}
        for task in tasks:
            cell = row.cells.get(task)
            own = None if cell is None else self.of(row.setting, kind, task, cell.score.count)
            if cell is not None and own is not None and own.score.mean > 0 and _comparable(cell, own):
                unit = 100 / own.score.mean
                found[task] = Mean(cell.score.mean * unit, cell.score.standard_error * unit)
        return found


def rows_of(store: Store, study: str) -> list[Row]:
    """The rows of a study, in the order in which they were first measured.

    Where a row was measured with several settings, the last one measured counts; where a task was with several
    numbers of items, the last one of that task: a task with fewer questions than were asked for stands in the row
    of the others.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Cell]]] = {}
    for cell in store.cells(study=study, split="test"):
        about = cell.parameters
        experts = tuple(about["experts"])
        group = groups.setdefault((about["setting"], about["row"], experts, about["seed"]), {})
        measured = group.pop(str(about["system"]), {})
        group[str(about["system"])] = {**measured, about["task"]: cell}
    rows = []
    for (setting, name, experts, seed), group in groups.items():
        cells = next(reversed(group.values()))
        system = next(iter(cells.values())).parameters["system"]
        rows.append(Row(study, setting, name, experts, seed, system, cells))
    return rows


def _comparable(cell: Cell, own: Cell) -> bool:
    """Whether the same questions were asked, as far as equal numbers of them tell."""
    asked = (cell.parameters["n"], cell.parameters.get("questions"))
    return asked[0] != own.parameters["n"] or asked[1] == own.parameters.get("questions")


def mean(ratios: Iterable[Mean]) -> Mean:
    """Mean over tasks, which are independent samples."""
    found = list(ratios)
    if not found:
        return Mean(math.nan, math.nan)
    error = math.sqrt(sum(each.error**2 for each in found)) / len(found)
    return Mean(sum(each.value for each in found) / len(found), error)


def over_seeds(means: Sequence[Mean]) -> Mean:
    """Mean over draws; the error joins that of the draws and that of the items, which the draws share."""
    values = [each.value for each in means if not math.isnan(each.value)]
    if not values:
        return Mean(math.nan, math.nan)
    items = sum(each.error for each in means if not math.isnan(each.value)) / len(values)
    draws = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(sum(values) / len(values), math.hypot(items, draws))
