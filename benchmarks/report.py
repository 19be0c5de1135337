"""Figures of a benchmark: one list, written as JSON by the benchmark itself, printed as a table."""

import json
import os
import platform
import subprocess
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
        at_least: the bound that must be met, in the direction of `better`; None where there is none.
        aim: what would be excellent.
        n: independent repetitions, or test items, behind the value.
        command: what makes the value again.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    n: int
    command: str
    at_least: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None without one."""
        if self.at_least is None:
            return None
        return self.value >= self.at_least if self.better == "higher" else self.value <= self.at_least


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
        ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def write(path: Path, figures: list[Figure]) -> None:
    """Write the figures with machine and commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "commit": commit(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(title: str, figures: list[Figure]) -> None:
    """Print the figures."""
    table = Table("figure", "value", "at least", "aim", "met", "n", "note", title=title)
    for f in figures:
        bound = "" if f.at_least is None else f"{f.at_least:g}"
        met = {None: "", True: "yes", False: "NO"}[f.met]
        aim = "" if f.aim is None else f"{f.aim:g}"
        table.add_row(f.name, f"{f.value:.3g} {f.unit}", bound, aim, met, str(f.n), f.note)
    Console().print(table)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
