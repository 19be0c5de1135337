"""Figures of a benchmark: one list, written as JSON by the benchmark itself, printed as a table."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured value and what it is held against.

    Attributes:
        value: None where it could not be measured here; the note then says why.
        at_least: the bound that must be met, in the direction of `better`; None where there is none.
        aim: what would be excellent.
        n: independent repetitions, or test items, behind the value.
        command: what makes the value again.
    """

    name: str
    value: float | None
    unit: str
    better: Literal["higher", "lower"]
    n: int
    command: str
    at_least: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None without a bound or a value."""
        return met(asdict(self))


def met(entry: dict[str, Any]) -> bool | None:
    """Whether an entry's bound is met; None without a bound or a value."""
    bound, value = entry["at_least"], entry["value"]
    if bound is None or value is None:
        return None
    return bool(value >= bound if entry["better"] == "higher" else value <= bound)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """The checked-out commit, marked if files differ from it."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "-uno", "--", ":!benchmarks/results"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def write(path: Path, figures: Sequence[Figure]) -> None:
    """Write the figures with machine and commit."""
    save(path, [asdict(figure) for figure in figures])


def load(path: Path) -> list[dict[str, Any]]:
    """The entries of an earlier report; none if there is none."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return found


def save(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write entries with machine and commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "commit": commit(), "figures": list(entries)}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def merge(path: Path, command: str, figures: Sequence[Figure], order: Sequence[str]) -> None:
    """Replace what `command` made earlier by `figures`, and keep all others.

    Each new entry names the commit that it was measured at: a report may be made of several runs.

    Args:
        order: commands in the order in which their entries stand.
    """
    at = commit()
    new = [{**asdict(figure), "commit": at} for figure in figures]
    kept = [entry for entry in load(path) if entry["command"] != command]
    place = {each: index for index, each in enumerate(order)}
    save(path, sorted([*kept, *new], key=lambda entry: place.get(entry["command"], len(place))))


def markdown(path: Path, title: str) -> str:
    """The report as Markdown: what has bounds first, then every value by command."""
    report = json.loads(path.read_text(encoding="utf-8"))
    about = report["machine"]
    lines = [
        f"# {title}",
        "",
        f"{about['cpu']}, {about['cores']} cores, AMX bf16: {'yes' if about['amx_bf16'] else 'no'}; "
        f"torch {about['torch']}, Python {about['python']}. Written by the commands below; never edited.",
        "",
        "## Held against bounds",
        "",
        *_table([entry for entry in report["figures"] if entry["at_least"] is not None], bounds=True),
    ]
    for command in dict.fromkeys(entry["command"] for entry in report["figures"]):
        own = [entry for entry in report["figures"] if entry["command"] == command]
        commits = ", ".join(sorted({entry.get("commit", report["commit"]) for entry in own}))
        lines += ["", f"## `{command}`", "", f"At commit {commits}.", "", *_table(own, bounds=False)]
    return "\n".join(lines) + "\n"


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print the figures."""
    table = Table("figure", "value", "at least", "aim", "met", "n", "note", title=title)
    for f in figures:
        bound = "" if f.at_least is None else f"{f.at_least:g}"
        verdict = {None: "", True: "yes", False: "NO"}[f.met]
        aim = "" if f.aim is None else f"{f.aim:g}"
        table.add_row(f.name, _value(f.value, f.unit), bound, aim, verdict, str(f.n), f.note)
    Console().print(table)


def _value(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.3g} {unit}"


def _verdict(entry: dict[str, Any]) -> str:
    return {None: "", True: "yes", False: "**no**"}[met(entry)]


def _table(entries: Sequence[dict[str, Any]], *, bounds: bool) -> list[str]:
    head = ["figure", "value", *(["at least", "aim", "met"] if bounds else []), "n", "note"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in entries:
        cells = [entry["name"], _value(entry["value"], entry["unit"])]
        if bounds:
            sign = "≥" if entry["better"] == "higher" else "≤"
            aim = "" if entry["aim"] is None else f"{entry['aim']:g}"
            cells += [f"{sign} {entry['at_least']:g}", aim, _verdict(entry)]
        cells += [str(entry["n"]), entry["note"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
