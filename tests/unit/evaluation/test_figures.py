"""Promises of results/quality.json: every row that must be shown is there, and benchmarks keep each other's."""

import json
from pathlib import Path

from benchmarks.quality import report
from benchmarks.quality.figures import FIFTY, ROUTED, STATIC, WANTED, contribute

MINE, OTHER = "python -m benchmarks.quality.report", "python -m benchmarks.quality.routers"


def entries(path: Path) -> dict[str, float | None]:
    return {entry["name"]: entry["value"] for entry in json.loads(path.read_text())["figures"]}


def test_rows_that_nobody_measured_stand_there_without_a_value(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    contribute([FIFTY.figure(98.0, 100, OTHER)], OTHER, path)
    contribute([ROUTED.figure(99.0, 100, MINE)], MINE, path)
    contribute([ROUTED.figure(99.5, 100, MINE)], MINE, path)
    found = entries(path)
    assert list(found) == [wanted.name for wanted in WANTED]
    assert (found[ROUTED.name], found[FIFTY.name], found[STATIC.name]) == (99.5, 98.0, None)


def test_figures_come_from_the_tables(tmp_path: Path) -> None:
    line = {"error": 1.0, "expert_bytes": 100, "right": 0.99, "n": 50, "settings": "rank 8", "raw": {}}
    rows = [
        {**line, "method": "Twin, oracle", "normalised": 99.0},
        {**line, "method": "averaging", "normalised": 3.0},
        {**line, "method": "ties", "normalised": 5.0},
    ]
    (tmp_path / "tables.json").write_text(json.dumps(rows))
    base = {
        "setting": "strong",
        "experts": 8,
        "held_in_error": 1.0,
        "held_out_error": 1.0,
        "seeds": 3,
        "n": 50,
    }
    scale = [
        {**base, "method": "Twin, router", "held_in": 99.0, "held_out": 101.0, "settings": ""},
        {**base, "method": "ties", "held_in": 40.0, "held_out": 104.0, "settings": ""},
    ]
    (tmp_path / "scale.json").write_text(json.dumps(scale))
    found = {figure.name: figure for figure in report.figures(tmp_path)}
    assert found["tables: Twin, oracle"].value == 99.0
    assert ROUTED.name not in found  # that is measured as it is served
    assert found[STATIC.name].value == 5.0
    held_out = found["held-out tasks, routed Twin / base"]
    assert (held_out.value, held_out.aim) == (1.01, 1.04)
