"""Rows → the studies' tables, as plain values, JSON and Markdown. Every hyper-parameter and n is printed."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experts.evaluation.rows import Mean, Row, Yardsticks, mean, over_seeds, rows_of
from experts.evaluation.store import Store

Entry = dict[str, Any]
"""One line of a table."""

TITLES = {
    "tables": "Methods on the experts' own tasks",
    "ablations": "Twin with other shared experts",
    "sparsity": "Sparsity of the exclusive vectors, oracle gates",
    "count": "Number of experts",
    "unseen": "Each task without its expert",
    "bytes": "Quality against bytes, oracle gates",
    "scale": "Merging at scale",
}


def entries(store: Store, study: str) -> list[Entry]:
    """The lines of a study's table."""
    rows, yardsticks = rows_of(store, study), Yardsticks(store)
    if study == "scale":
        return scale_entries(rows, yardsticks)
    if study == "unseen":
        return _unseen(rows, yardsticks)
    return [_entry(row, yardsticks) for row in rows]


def _entry(row: Row, yardsticks: Yardsticks) -> Entry:
    own = [task for task in row.experts if task in row.cells] or list(row.cells)
    ratios = yardsticks.ratios(row, "expert", own)
    average = mean(ratios.values())
    right, silent, total = row.routed(own)
    return {
        "setting": row.setting,
        "method": row.name,
        "experts": len(row.experts),
        "normalised": average.value,
        "error": average.error,
        "expert_bytes": int(row.fact("expert_bytes")),
        "build_seconds": row.fact("build_seconds"),
        "right": right / total if total else None,
        "abstained": silent / total if total else None,
        "n": row.items,
        "settings": row.settings,
        "raw": {task: [100 * c.score.mean, 100 * c.score.standard_error] for task, c in row.cells.items()},
    }


def _unseen(rows: Sequence[Row], yardsticks: Yardsticks) -> list[Entry]:
    """One line a method: the mean over the tasks that were left out."""
    found: list[Entry] = []
    for (setting, name), own in _grouped(rows, lambda row: (row.setting, row.name)):
        ratios = {
            task: ratio for row in own for task, ratio in yardsticks.ratios(row, "expert", row.cells).items()
        }
        average = mean(ratios.values())
        counts = [row.routed(row.cells) for row in own]
        total = sum(count[2] for count in counts)
        found.append(
            {
                "setting": setting,
                "method": name,
                "tasks": len(ratios),
                "normalised": average.value,
                "error": average.error,
                "abstained": sum(count[1] for count in counts) / total if total else None,
                "n": min(row.items for row in own),
                "settings": own[0].settings,
                "raw": {
                    task: [100 * c.score.mean, 100 * c.score.standard_error]
                    for row in own
                    for task, c in row.cells.items()
                },
            }
        )
    return found


def scale_entries(rows: Sequence[Row], yardsticks: Yardsticks) -> list[Entry]:
    """One line for each base, method and number of experts: held-in % of the expert, held-out % of the base."""
    found: list[Entry] = []
    for (setting, name, number), own in _grouped(rows, lambda row: (row.setting, row.name, len(row.experts))):
        held_in = [mean(yardsticks.ratios(row, "expert", row.experts).values()) for row in own]
        held_out = [
            mean(yardsticks.ratios(row, "base", [t for t in row.cells if t not in row.experts]).values())
            for row in own
        ]
        inside, outside = over_seeds(held_in), over_seeds(held_out)
        counts = [row.routed([t for t in row.cells if t not in row.experts]) for row in own]
        total = sum(count[2] for count in counts)
        right = [row.routed(row.experts) for row in own]
        asked = sum(count[2] for count in right)
        found.append(
            {
                "setting": setting,
                "method": name,
                "experts": number,
                "held_in": inside.value,
                "held_in_error": inside.error,
                "held_out": outside.value,
                "held_out_error": outside.error,
                "right": sum(count[0] for count in right) / asked if asked else None,
                "held_out_abstained": sum(count[1] for count in counts) / total if total else None,
                "seeds": len(own),
                "n": min(row.items for row in own),
                "settings": " / ".join(dict.fromkeys(row.settings for row in own)),
            }
        )
    return found


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def markdown(title: str, lines: Sequence[Entry]) -> str:
    """The table of a study, then the raw scores by task where there are any."""
    shown = [column for column in _COLUMNS if any(column[1](line) for line in lines)]
    head = [name for name, _ in shown]
    text = [f"# {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    text += ["| " + " | ".join(cell(line) for _, cell in shown) + " |" for line in lines]
    tasks = list(dict.fromkeys(task for line in lines for task in line.get("raw", {})))
    if tasks:
        text += ["", "Raw scores in %, ± standard error:", "", "| method | " + " | ".join(tasks) + " |"]
        text.append("|---" * (len(tasks) + 1) + "|")
        for line in lines:
            raw = {task: f"{value:.1f} ± {error:.1f}" for task, (value, error) in line["raw"].items()}
            name = f"{line['method']} ({line['experts']})" if "experts" in line else line["method"]
            text.append(f"| {name} | " + " | ".join(raw.get(task, "") for task in tasks) + " |")
    return "\n".join(text) + "\n"


def _percent(line: Entry, name: str) -> str:
    return "" if line.get(name) is None else f"{100 * line[name]:.1f} %"


def _mean(line: Entry, value: str, error: str) -> str:
    found = line.get(value)
    return "" if found is None or found != found else str(Mean(found, line[error]))


_COLUMNS: tuple[tuple[str, Callable[[Entry], str]], ...] = (
    ("base", lambda line: str(line["setting"])),
    ("method", lambda line: str(line["method"])),
    ("experts", lambda line: str(line.get("experts", ""))),
    ("normalised", lambda line: _mean(line, "normalised", "error")),
    ("held-in, % of the expert", lambda line: _mean(line, "held_in", "held_in_error")),
    ("held-out, % of the base", lambda line: _mean(line, "held_out", "held_out_error")),
    ("MB an expert", lambda line: f"{line['expert_bytes'] / 1e6:.2f}" if line.get("expert_bytes") else ""),
    ("build s", lambda line: f"{line['build_seconds']:.1f}" if line.get("build_seconds") else ""),
    ("routed right", lambda line: _percent(line, "right")),
    ("abstained", lambda line: _percent(line, "abstained")),
    ("held-out abstained", lambda line: _percent(line, "held_out_abstained")),
    ("draws", lambda line: str(line.get("seeds", ""))),
    ("n a task", lambda line: str(line["n"])),
    ("settings", lambda line: str(line["settings"])),
)


def write_tables(store: Store, out: Path) -> list[Path]:
    """Write `<study>.json` and `<study>.md` for every study that has cells."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for study, title in TITLES.items():
        lines = entries(store, study)
        if lines:
            for suffix, text in (
                ("json", json.dumps(lines, indent=1) + "\n"),
                ("md", markdown(title, lines)),
            ):
                path = out / f"{study}.{suffix}"
                path.write_text(text, encoding="utf-8")
                written.append(path)
    return written
