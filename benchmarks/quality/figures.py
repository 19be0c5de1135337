"""The figures of `results/quality.json`: what must be shown, and how the benchmarks of quality join their parts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.report import Figure, load, save

RESULTS = Path("benchmarks/results/quality.json")
_OURS = ("python -m benchmarks.quality.", "twinserve eval")


@dataclass(frozen=True)
class Wanted:
    """A row that the report must have, measured or not."""

    name: str
    unit: str
    at_least: float | None
    aim: float | None
    better: Literal["higher", "lower"] = "higher"

    def figure(
        self, value: float | None, n: int, command: str, note: str = "", aim: float | None = None
    ) -> Figure:
        """The row with its value."""
        return Figure(
            self.name, value, self.unit, self.better, n, command, self.at_least,
            self.aim if aim is None else aim, note,
        )  # fmt: skip


ROUTED = Wanted("embedded family, automatic routing, unknown task: mean normalised", "% of expert", 97, 99.5)
SMALL = Wanted("the same at ≤ 1 % of a full model's bytes an expert", "% of expert", 90, 96)
STATIC = Wanted("best static merge of the same experts", "% of expert", None, None)
HELD_OUT = Wanted("held-out tasks, routed Twin / base", "ratio", 1.0, None)
DATA_FREE = Wanted("20 experts, router accuracy: data-free", "%", 90, 96)
FIFTY = Wanted("20 experts, router accuracy: 50 prompts each", "%", 97, 99)
ABSTAINED = Wanted("out-of-distribution prompts sent to the shared expert", "%", 80, 95)
FALSE = Wanted("false abstention on the experts' own prompts", "%", 2, None, "lower")
CLASSIFIED = Wanted("encoder classification, unknown task and head, normalised", "% of expert", 96, 99.4)
JOINING = Wanted("adding an expert to the router with 50 prompts", "s", 5, 1, "lower")
WANTED = (ROUTED, SMALL, STATIC, HELD_OUT, DATA_FREE, FIFTY, ABSTAINED, FALSE, CLASSIFIED, JOINING)


def contribute(figures: Sequence[Figure], command: str, path: Path = RESULTS) -> None:
    """Replace what `command` made earlier; rows that nobody has measured stand there without a value.

    What must be shown comes first, in the order of `WANTED`.
    """
    kept = [
        entry
        for entry in load(path)
        if entry["value"] is not None and entry["command"] != command and entry["command"].startswith(_OURS)
    ]
    entries = [*kept, *(asdict(figure) for figure in figures)]
    names = {entry["name"] for entry in entries if entry["value"] is not None}
    entries = [entry for entry in entries if entry["value"] is not None or entry["name"] not in names]
    present = {entry["name"] for entry in entries}
    missing = [w.figure(None, 0, "", "not measured") for w in WANTED if w.name not in present]
    entries += [asdict(figure) for figure in missing]
    place = {wanted.name: index for index, wanted in enumerate(WANTED)}
    save(path, sorted(entries, key=lambda entry: place.get(entry["name"], len(place))))


def table(path: Path) -> list[dict[str, object]]:
    """The entries of one of the studies' tables; none where it has not been measured."""
    if not path.is_file():
        return []
    found: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return found
