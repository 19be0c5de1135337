"""The engine's benchmark suite: every row of its table, in paired runs.

`python -m benchmarks.engine [--only steps,served]` runs the sections, each in a process of its own, and writes
`results/engine.json`, `engine.md` and the plots after each. What was measured earlier by other sections stays.
Every section states its workload in the notes of its figures; `--smoke` runs all of it with tiny counts into
another file, to see that everything works.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks import plots
from benchmarks.context import Context
from benchmarks.report import Figure, markdown, merge, show
from experts.bundle import Bundle

SECTIONS = {
    "steps": "steps:embedded",
    "gemma": "steps:gemma",
    "mixed": "mixed:mixed",
    "peft": "rivals:peft",
    "reference": "rivals:reference",
    "llama": "rivals:llama",
    "vllm": "rivals:vllm",
    "openvino": "rivals:openvino",
    "served": "served:served",
    "latency": "served:latency",
    "slots": "slots:slots",
    "routing": "routing:routing",
    "loading": "interruptions:loading",
    "longprompt": "interruptions:longprompt",
    "merged": "merged:merged",
    "startup": "startup:startup",
    "memory": "memory:memory",
    "kernels": "kernels:kernels",
}
"""Name → module and function in `benchmarks/sections`."""

TITLE = "Engine benchmarks"
_RESULTS = Path(__file__).parent / "results"


def command_of(section: str) -> str:
    """What makes a section's figures again."""
    return f"python -m benchmarks.engine --only {section}"


def main() -> None:
    """Run the chosen sections; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--work", type=Path, default=Path(".twinserve/peers"), help="peers and other models")
    parser.add_argument("--out", type=Path, default=_RESULTS / "engine.json")
    parser.add_argument("--rounds", type=int, default=3, help="paired runs of every cell")
    parser.add_argument("--smoke", action="store_true", help="tiny counts; writes smoke.json instead")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out == _RESULTS / "engine.json":
        arguments.out = Path(".twinserve") / "smoke" / "engine.json"
    if arguments.section:
        _measure(arguments.section, arguments)
        return
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    failed = [name for name in SECTIONS if name in chosen and not _start(name)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _start(section: str) -> bool:
    """One section in a process of its own: OpenMP pools and memory of others would change what is measured."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", "--section", section, *sys.argv[1:]], check=False
    )
    print(f"{section}: {'done' if not done.returncode else 'FAILED'}, {time.monotonic() - started:.0f} s\n")
    return not done.returncode


def _measure(section: str, arguments: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    log = Console()
    log.rule(section)
    context = Context(
        bundle=arguments.bundle,
        work=arguments.work,
        command=command_of(section),
        rounds=1 if arguments.smoke else arguments.rounds,
        smoke=arguments.smoke,
        log=log,
    )
    module, _, function = SECTIONS[section].partition(":")
    figures: list[Figure] = getattr(importlib.import_module(f"benchmarks.sections.{module}"), function)(
        context
    )
    merge(arguments.out, context.command, figures, [command_of(name) for name in SECTIONS])
    arguments.out.with_suffix(".md").write_text(markdown(arguments.out, TITLE), encoding="utf-8")
    plots.draw(arguments.out)
    show(f"twinserve on {Bundle.open(arguments.bundle, verify=False, lazy=True).manifest.name}", figures)


if __name__ == "__main__":
    main()
