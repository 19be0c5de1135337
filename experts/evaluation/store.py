"""What was measured, kept as JSON lines: one line a cell, appended when it is done, never rewritten.

A cell is known by all its parameters. A run that is started again skips the cells that are there; a line cut off by
a crash is dropped when the file is opened for writing again.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import EvaluationError
from experts.evaluation.scoring import Score, summarise

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One system on one task's items.

    Attributes:
        parameters: everything that decides the scores; JSON-able.
        scores: of each item, in the task's order.
        facts: what else was seen: seconds, bytes, where requests were routed.
    """

    parameters: Parameters
    scores: tuple[float, ...]
    facts: Mapping[str, Any]

    @property
    def score(self) -> Score:
        """Mean, standard error and count of the items."""
        return summarise(self.scores)


class Store:
    """The cells of one file."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            EvaluationError: a line other than the last is not a cell.
        """
        self.path = path
        self._cells: dict[str, Cell] = {}
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were added since."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # being written, or cut off
                try:
                    entry = json.loads(line)
                    cell = Cell(entry["parameters"], tuple(entry["scores"]), entry["facts"])
                except (ValueError, KeyError, TypeError) as error:
                    raise EvaluationError(
                        f"{self.path}, line {number} from byte {self._read}: not a cell ({error}); remove the line"
                    ) from error
                self._remember(cell)
                self._read += len(line)

    def get(self, parameters: Parameters) -> Cell | None:
        """The cell of exactly these parameters."""
        return self._cells.get(key_of(parameters))

    def put(self, cell: Cell) -> None:
        """Append a cell; the line is complete or dropped, whenever the machine stops."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(
            {"parameters": cell.parameters, "scores": _short(cell.scores), "facts": cell.facts},
            ensure_ascii=False,
        )
        with self.path.open("ab") as file:
            if file.tell() > self._read:
                file.truncate(self._read)
            file.write(line.encode() + b"\n")
            self._read = file.tell()
        self._remember(cell)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other processes from writing meanwhile.

        Raises:
            EvaluationError: another one does.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EvaluationError(
                    f"{self.path} is being written by another evaluation; wait for it or give another --work"
                ) from error
            yield

    def cells(self, **wanted: Any) -> Iterator[Cell]:
        """Those whose parameters have these values, in the order in which they were measured."""
        for cell in self._cells.values():
            if all(cell.parameters.get(name) == value for name, value in wanted.items()):
                yield cell

    def _remember(self, cell: Cell) -> None:
        key = key_of(cell.parameters)
        self._cells.pop(key, None)
        self._cells[key] = cell


def key_of(parameters: Parameters) -> str:
    """The same text for the same parameters, in whatever order they stand."""
    return json.dumps(parameters, sort_keys=True, ensure_ascii=False)


def _short(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]
