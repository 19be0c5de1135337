"""Promises of the tables: what is divided by what, which settings count, and how errors join."""

import math
from pathlib import Path
from typing import Any

import pytest

from experts.evaluation.rows import Mean, Yardsticks, mean, over_seeds, rows_of
from experts.evaluation.store import Cell, Store
from experts.evaluation.summaries import entries, markdown

STATIC = {"kind": "static", "method": {"method": "task-arithmetic", "scale": 0.3}}


def cell(study: str, row: str, task: str, scores: list[float], **changes: Any) -> Cell:
    parameters = {
        "study": study,
        "setting": "strong",
        "base": "b",
        "row": row,
        "system": {"kind": "base"},
        "experts": {},
        "seed": 0,
        "task": task,
        "split": "test",
        "n": len(scores),
    }
    return Cell(parameters | changes, tuple(scores), {})


def store_of(tmp_path: Path, *cells: Cell) -> Store:
    store = Store(tmp_path / "cells.jsonl")
    for each in cells:
        store.put(each)
    return Store(tmp_path / "cells.jsonl")


def test_held_in_is_divided_by_the_expert_and_held_out_by_the_base(tmp_path: Path) -> None:
    merged = {"system": STATIC, "experts": {"a": "1"}}
    store = store_of(
        tmp_path,
        cell("reference", "expert", "a", [1.0, 0.5]),
        cell("reference", "base", "a", [0.1, 0.1]),
        cell("reference", "base", "h", [0.5, 0.5]),
        cell("scale", "task-arithmetic", "a", [0.6, 0.6], **merged),
        cell("scale", "task-arithmetic", "h", [0.6, 0.6], **merged),
    )
    entry = entries(store, "scale")[0]
    assert entry["held_in"] == pytest.approx(80)
    assert entry["held_out"] == pytest.approx(120)
    assert "scale 0.3" in entry["settings"]
    assert "| 80.0 ± 0.0 | 120.0 ± 0.0 |" in markdown("x", [entry])


def test_the_settings_measured_last_count(tmp_path: Path) -> None:
    other = {"kind": "static", "method": {"method": "task-arithmetic", "scale": 0.5}}
    first = cell("tables", "task-arithmetic", "a", [0.1], system=STATIC, experts={"a": "1"})
    last = cell("tables", "task-arithmetic", "a", [0.7], system=other, experts={"a": "1"})
    rows = rows_of(store_of(tmp_path, first, last), "tables")
    assert [row.cells["a"].score.mean for row in rows] == [0.7]


def test_a_task_that_its_yardstick_fails_is_left_out(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        cell("reference", "expert", "a", [0.0, 0.0]),
        cell("tables", "x", "a", [0.5, 0.5], experts={"a": "1"}),
    )
    row = rows_of(store, "tables")[0]
    assert Yardsticks(store).ratios(row, "expert", ["a"]) == {}
    assert math.isnan(mean([]).value)


def test_errors_of_draws_and_of_items_join() -> None:
    joined = over_seeds([Mean(90, 3), Mean(100, 3), Mean(110, 3)])
    assert joined.value == 100
    assert joined.error == pytest.approx(math.hypot(3, 10 / math.sqrt(3)))


def test_a_task_with_fewer_questions_than_were_asked_for_stays_in_the_row(tmp_path: Path) -> None:
    merged = {"system": STATIC, "experts": {"a": "1"}}
    store = store_of(
        tmp_path,
        cell("reference", "base", "long", [0.5] * 4),
        cell("reference", "base", "short", [0.5] * 3),
        cell("scale", "x", "long", [0.1] * 2, **merged),
        cell("scale", "x", "short", [0.1] * 2, **merged),
        cell("scale", "x", "long", [0.5] * 4, **merged),
        cell("scale", "x", "short", [0.25] * 3, **merged),
    )
    (row,) = rows_of(store, "scale")
    assert {task: each.score.count for task, each in row.cells.items()} == {"long": 4, "short": 3}
    assert row.items == 3
    assert entries(store, "scale")[0]["held_out"] == pytest.approx(75)


def test_other_questions_are_no_yardstick(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        cell("reference", "expert", "a", [0.5, 0.5], questions="new"),
        cell("tables", "x", "a", [0.5, 0.5], experts={"a": "1"}, questions="old"),
    )
    assert Yardsticks(store).ratios(rows_of(store, "tables")[0], "expert", ["a"]) == {}
