"""Plots of the reports, drawn from their JSON alone."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STEP = re.compile(r"(\w+) / generate, (.+), batch (\d+), prompt 128, \d+ new$")
_PART = re.compile(r"served decode step, (\d+) clients: (?!whole turn|beside)(.+)")
_BOUND, _VALUE, _RIVAL = "#b03a2e", "#2e6da4", "#9aa5b1"


def draw(report: Path) -> None:
    """Write every plot that the report has figures for, beside it; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    # The same figures give the same bytes.
    mpl.rcParams.update({"svg.hashsalt": "twinserve", "font.size": 8, "svg.fonttype": "none"})
    entries = json.loads(report.read_text(encoding="utf-8"))["figures"]
    entries = [entry for entry in entries if entry["value"] is not None]
    values = {entry["name"]: entry["value"] for entry in entries}
    folder = report.parent
    _steps(folder / "engine-steps.svg", values)
    _rivals(folder / "engine-rivals.svg", entries)
    _breakdown(folder / "engine-breakdown.svg", values)


def draw_quality(folder: Path) -> None:
    """Write the plots of the quality studies that are there, beside their tables.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RuntimeError("the plots need matplotlib; run: pip install 'twinserve[bench]'") from error
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "twinserve", "font.size": 8, "svg.fonttype": "none"})
    _bytes(folder / "quality-bytes.svg", _entries(folder / "bytes.json"))
    _count(folder / "quality-experts.svg", _entries(folder / "count.json"))
    _scale(folder / "quality-scale.svg", _entries(folder / "scale.json"))


def _entries(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def _bytes(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One line a form: normalised quality against bytes of an expert."""
    if not entries:
        return
    figure, axes = _axes(5, 3)
    forms = dict.fromkeys(entry["method"].split()[0] for entry in entries)
    for form in forms:
        own = sorted(
            (entry for entry in entries if entry["method"].split()[0] == form),
            key=lambda entry: float(entry["expert_bytes"]),
        )
        sizes = [entry["expert_bytes"] / 1e6 for entry in own]
        means, errors = [entry["normalised"] for entry in own], [entry["error"] for entry in own]
        axes.errorbar(sizes, means, errors, marker="o", markersize=3, linewidth=1, label=form)
    axes.set_xscale("log")
    axes.set_xlabel("MB an expert")
    axes.set_ylabel("% of the expert alone, oracle gates")
    axes.legend(frameon=False)
    _save(figure, path)


def _count(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One line a method: normalised quality against the number of experts."""
    if not entries:
        return
    figure, axes = _axes(4, 2.8)
    _lines(axes, entries, "normalised", "error")
    axes.set_ylabel("% of the expert alone")
    axes.legend(frameon=False)
    _save(figure, path)


def _scale(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Panels: bases across, held-in above held-out."""
    from matplotlib import pyplot

    bases = list(dict.fromkeys(entry["setting"] for entry in entries))
    if not bases:
        return
    figure, panels = pyplot.subplots(
        2, len(bases), figsize=(3.6 * len(bases), 5.2), squeeze=False, sharex=True
    )
    for column, base in enumerate(bases):
        own = [entry for entry in entries if entry["setting"] == base]
        for line, (kind, unit) in enumerate((("held_in", "expert"), ("held_out", "base"))):
            axes = panels[line][column]
            axes.spines[["top", "right"]].set_visible(False)
            axes.axhline(100, color=_BOUND, linewidth=0.6)
            _lines(axes, [entry for entry in own if entry[kind] == entry[kind]], kind, f"{kind}_error")
            axes.set_ylabel(f"{kind.replace('_', '-')}, % of the {unit}")
            if line == 0:
                axes.set_title(f"{base} base")
    panels[0][0].legend(frameon=False, fontsize=6)
    _save(figure, path)


def _lines(axes: Any, entries: Sequence[Mapping[str, Any]], value: str, error: str) -> None:
    for method in dict.fromkeys(entry["method"] for entry in entries):
        own = sorted((e for e in entries if e["method"] == method), key=lambda e: int(e["experts"]))
        if len(own) > 1:
            axes.errorbar([entry["experts"] for entry in own], [entry[value] for entry in own],
                          [entry[error] for entry in own], marker="o", markersize=3, linewidth=1, capsize=2,
                          label=method)  # fmt: skip
    axes.set_xlabel("experts")
    axes.set_xticks(sorted({int(entry["experts"]) for entry in entries if entry["experts"]}))


def _steps(path: Path, values: Mapping[str, float]) -> None:
    found = [(match, value) for name, value in values.items() if (match := _STEP.match(name))]
    found = [(match, value) for match, value in found if match[2] == "embedded"]
    if not found:
        return
    kinds = list(dict.fromkeys(match[1] for match, _ in found))
    batches = sorted({int(match[3]) for match, _ in found})
    figure, axes = _axes(5, 2.8)
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        heights = {int(match[3]): value for match, value in found if match[1] == kind}
        axes.bar([i + place * width for i in range(len(batches))],
                 [heights.get(batch, 0) for batch in batches], width * 0.9, label=kind)  # fmt: skip
    axes.axhline(1, color=_BOUND, linewidth=0.8)
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(batches))], [f"batch {batch}" for batch in batches]
    )
    axes.set_ylabel("time / HF generate, plain")
    axes.legend(frameon=False, ncols=len(kinds), loc="lower center", bbox_to_anchor=(0.5, 1))
    _save(figure, path)


def _rivals(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    found = {entry["name"]: entry["value"] for entry in entries if entry["unit"] == "tokens/s"}
    duels = [name for name in found if f"twinserve beside {name}" in found]
    if not duels:
        return
    figure, axes = _axes(5, 0.45 * len(duels) + 0.8)
    for place, name in enumerate(reversed(duels)):
        own, other = found[f"twinserve beside {name}"], found[name]
        axes.barh([place + 0.2, place - 0.2], [own, other], 0.36, color=[_VALUE, _RIVAL])
        axes.text(max(own, other), place, f"  {own / other:.1f}x", va="center")
    axes.set_yticks(range(len(duels)), list(reversed(duels)))
    axes.set_xlabel("tokens/s: twinserve (blue), the other (grey)")
    axes.margins(x=0.12)
    _save(figure, path)


def _breakdown(path: Path, values: Mapping[str, float]) -> None:
    found = [(match, value) for name, value in values.items() if (match := _PART.match(name))]
    if not found:
        return
    clients = sorted({int(match[1]) for match, _ in found})
    parts = list(dict.fromkeys(match[2] for match, _ in found))
    figure, axes = _axes(6, 0.22 * len(parts) + 0.9)
    height = 0.8 / len(clients)
    for place, count in enumerate(clients):
        own = {match[2]: value for match, value in found if int(match[1]) == count}
        axes.barh([i - place * height for i in range(len(parts))],
                  [own.get(part, 0) for part in reversed(parts)], height * 0.9, label=f"{count} clients")  # fmt: skip
    axes.set_yticks(range(len(parts)), list(reversed(parts)))
    axes.set_xlabel("ms of a served decode step")
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
