"""Tables, plots and figures of `twinserve eval`, made again from its store alone.

twinserve eval tables scale bytes && python -m benchmarks.quality.report
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.plots import draw_quality
from benchmarks.quality.figures import CLASSIFIED, HELD_OUT, RESULTS, STATIC, contribute, table
from benchmarks.report import Figure, load, show
from experts.evaluation.store import Store
from experts.evaluation.studies.grids import METHODS
from experts.evaluation.summaries import write_tables

COMMAND = "twinserve eval tables scale bytes && python -m benchmarks.quality.report"
FOLDER = Path("benchmarks/quality")
MULTITASK = "multi-task model"
Entry = dict[str, Any]


def figures(folder: Path) -> list[Figure]:
    """Every figure that the studies' tables hold."""
    tables, scale = table(folder / "tables.json"), table(folder / "scale.json")
    found = [*_family(tables), *_held_out(scale)]
    for study in ("tables", "ablations", "sparsity", "count", "unseen", "bytes"):
        for entry in table(folder / f"{study}.json"):
            found.append(_normalised(study, entry))
    for entry in scale:
        found += _scaled(entry)
    return found


def _family(entries: list[Entry]) -> list[Figure]:
    """The best static merge of the embedded family; what is served of it, `benchmarks.quality.served` measures."""
    rows = {entry["method"]: entry for entry in entries}
    found = []
    static = [rows[name] for name in METHODS if name in rows]
    if static:
        best = max(static, key=lambda entry: entry["normalised"])
        note = f"{best['method']}; standard error {best['error']:.1f}; {best['settings']}"
        found.append(STATIC.figure(best["normalised"], best["n"], COMMAND, note))
    return found


def _held_out(entries: list[Entry]) -> list[Figure]:
    """Routed Twin on held-out tasks at the largest merge of each base, beside its rivals."""
    found = []
    for base in dict.fromkeys(entry["setting"] for entry in entries):
        own = [
            entry for entry in entries if entry["setting"] == base and entry["held_out"] == entry["held_out"]
        ]
        largest = max((entry["experts"] for entry in own if entry["method"] == "Twin, router"), default=0)
        rows = {e["method"]: e for e in own if e["experts"] in (largest, 0) or e["method"] == MULTITASK}
        twin = rows.get("Twin, router")
        if twin is None:
            continue
        rivals = {n: e for n, e in rows.items() if n == MULTITASK or n in METHODS}
        best = max((entry["held_out"] for entry in rivals.values()), default=None)
        note = (
            f"{base} base, {largest} experts, {twin['seeds']} draws; standard error "
            f"{twin['held_out_error'] / 100:.3f}; rivals: "
            + ", ".join(f"{n} {e['held_out'] / 100:.3f} (n {e['n']})" for n, e in rivals.items())
        )
        aim = None if best is None else round(best / 100, 4)
        found.append(HELD_OUT.figure(twin["held_out"] / 100, twin["n"], COMMAND, note, aim))
    return found


def _normalised(study: str, entry: Entry) -> Figure:
    number = f", {entry['experts']} experts" if study == "count" else ""
    size = f"; {entry['expert_bytes'] / 1e6:.2f} MB an expert" if entry.get("expert_bytes") else ""
    return Figure(
        f"{study}: {entry['method']}{number}", entry["normalised"], "% of expert", "higher", entry["n"], COMMAND,
        note=f"standard error {entry['error']:.2f}{size}; {entry['settings']}",
    )  # fmt: skip


def _scaled(entry: Entry) -> list[Figure]:
    found = []
    for kind, unit in (("held_in", "% of expert"), ("held_out", "% of base")):
        value = entry[kind]
        if value == value:
            name = f"scale: {entry['method']}, {entry['setting']} base, {entry['experts']} experts, {kind}"
            note = f"standard error {entry[f'{kind}_error']:.2f} over {entry['seeds']} draws; {entry['settings']}"
            found.append(Figure(name, value, unit, "higher", entry["n"], COMMAND, note=note))
    return found


def classified(path: Path) -> list[Figure]:
    """The routed row of `benchmarks.quality.classification`, under the name that it is asked for by."""
    own = [entry for entry in load(path) if entry["name"].startswith("classification: Twin, routed: ")]
    if not own:
        return []
    best = max(own, key=lambda entry: float(entry["value"]))
    note = f"{best['name'].removeprefix('classification: ')}; {best['note']}"
    return [CLASSIFIED.figure(best["value"], best["n"], best["command"], note)]


def main() -> None:
    """Write tables, plots and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path(".twinserve/eval/cells.jsonl"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    write_tables(Store(arguments.store), arguments.folder)
    draw_quality(arguments.folder)
    made = figures(arguments.folder)
    contribute(made, COMMAND, arguments.out)
    for figure in classified(arguments.out.parent / "classification.json"):
        contribute([figure], figure.command, arguments.out)
    show("quality", [figure for figure in made if figure.at_least is not None or figure.name == STATIC.name])


if __name__ == "__main__":
    main()
