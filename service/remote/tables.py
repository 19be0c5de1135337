"""Answers as tables that fit into 80 columns."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from service.remote.console import plain

Row = Mapping[str, Any]
Justify = Literal["left", "right"]

_STYLES = {
    "active": "green", "ready": "green", "succeeded": "green", "disabled": "yellow", "queued": "yellow",
    "running": "cyan", "registering": "cyan", "retired": "dim", "collected": "dim", "cancelled": "dim",
    "failed": "red",
}  # fmt: skip


def experts(rows: Sequence[Row]) -> None:
    """One line an expert."""
    table = _table(("NAME", "left", 24), ("GEN", "right", 5), ("STATE", "left", 9), ("ROUTED", "left", 6),
                   ("IN USE", "right", 6), ("SIZE", "right", 9), ("NOTES", "left", 16))  # fmt: skip
    for row in rows:
        table.add_row(
            plain(row["name"]),
            str(row["generation"] or "-"),
            _state(row["state"]),
            "yes" if row["routed"] else "no",
            str(row["leases"]),
            decimal(int(row["bytes"])),
            _notes(row),
        )
    _print(table, rows, "no experts")


def expert(row: Row) -> None:
    """One expert and its newest generations."""
    facts = {
        "generation": str(row["generation"] or "-"),
        "state": plain(row["state"]) + ("" if row["loaded"] else ", not loaded on this replica"),
        "routed": "yes" if row["routed"] else "by name and gates only",
        "in use": f"{row['leases']} requests",
        "size": f"{decimal(int(row['bytes']))}, rank up to {row['max_rank']}",
        "notes": _notes(row),
        "aliases": ", ".join(plain(alias) for alias in row.get("aliases", ())),
    }
    console = Console()
    console.print(Text(plain(row["name"]), style="bold"))
    for what, fact in facts.items():
        if fact:
            console.print(Text(f"  {what:<11}{fact}"), highlight=False)
    if row.get("generations"):
        generations(row["generations"])


def generations(rows: Sequence[Row]) -> None:
    """One line a generation."""
    table = _table(("GEN", "right", 5), ("STATE", "left", 11), ("SOURCE", "left", 6), ("SIZE", "right", 9),
                   ("RANK", "right", 5), ("ERROR", "right", 6), ("MADE", "left", 16), ("", "left", 8))  # fmt: skip
    for row in rows:
        error = row["relative_error"]
        table.add_row(
            str(row["generation"]),
            _state(row["state"]),
            plain(row["source"] or "-"),
            decimal(int(row["bytes"])),
            "-" if row["max_rank"] is None else str(row["max_rank"]),
            "-" if error is None else f"{100 * float(error):.1f}%",
            _when(row["created_at"]),
            "serving" if row["serving"] else "",
        )
    _print(table, rows, "no generations")


def jobs(rows: Sequence[Row]) -> None:
    """One line a job, and why those failed that did."""
    table = _table(("JOB", "left", 30), ("KIND", "left", 9), ("NAME", "left", 14), ("STATE", "left", 9),
                   ("MADE", "left", 11))  # fmt: skip
    for row in rows:
        state = _state(row["state"])
        if row["state"] == "running":
            state.append(f" {float(row['percent']):.0f}%")
        table.add_row(
            plain(row["id"]),
            plain(row["kind"]),
            plain(row["name"] or "-"),
            state,
            _when(row["created_at"])[5:],
        )
    _print(table, rows, "no jobs")


def job(row: Row) -> None:
    """One job in full."""
    error = row["error"]
    facts = {
        "kind": plain(row["kind"]),
        "expert": plain(row["name"] or ""),
        "generation": str(row["generation"] or ""),
        "state": plain(row["state"]),
        "stage": plain(f"{row['stage']} {row['tensor']}".strip()) if row["state"] == "running" else "",
        "percent": f"{float(row['percent']):.0f}",
        "attempt": str(row["attempt"]),
        "began": _when(row["started_at"]),
        "ended": _when(row["ended_at"]) if row["ended_at"] else "",
        "error": plain(f"{error['code']}: {error['message']}") if error else "",
    }
    console = Console()
    console.print(Text(plain(row["id"]), style="bold"))
    for what, fact in facts.items():
        if fact:
            console.print(Text(f"  {what:<11}{fact}"), highlight=False)


def aliases(rows: Sequence[Row]) -> None:
    """One line an alias."""
    table = _table(("ALIAS", "left", 36), ("EXPERT", "left", 36))
    for row in rows:
        table.add_row(plain(row["alias"]), plain(row["expert"]))
    _print(table, rows, "no aliases")


def bundles(rows: Sequence[Row]) -> None:
    """One line a bundle."""
    table = _table(
        ("BUILD", "left", 32), ("STATE", "left", 10), ("CREATED", "left", 16), ("NOTES", "left", 12)
    )
    for row in rows:
        notes = "returnable" if row["returnable"] else ""
        table.add_row(plain(row["build_id"]), _state(row["state"]), _when(row["created_at"]), notes)
    _print(table, rows, "no bundles")


def _notes(row: Row) -> str:
    trial = row.get("trial")
    notes = [
        "pinned" if row["pinned"] else "",
        f"{trial['kind']} {trial['generation']} {float(trial['percent']):g}%" if trial else "",
    ]
    return ", ".join(note for note in notes if note)


def _state(state: object) -> Text:
    return Text(plain(state), style=_STYLES.get(str(state), ""))


def _when(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(float(at)).astimezone().strftime("%Y-%m-%d %H:%M")


def _table(*columns: tuple[str, Justify, int]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for title, justify, width in columns:
        table.add_column(title, justify=justify, max_width=width, no_wrap=True, overflow="ellipsis")
    return table


def _print(table: Table, rows: Iterable[Row], otherwise: str) -> None:
    Console().print(table if list(rows) else Text(otherwise), highlight=False)
