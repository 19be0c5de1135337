"""Ways to run a decode step of the embedded model faster, each tried once: `python -m benchmarks.ways`.

Batch 8, bfloat16, some 130 tokens of context. Each way runs in a process of its own with a time limit; one that
fails is reported with its error. Writes `results/ways.json` and `results/ways.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import commit, machine

BATCH, CONTEXT, STEPS = 8, 128, 32
LIMIT_SECONDS = 420
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Way:
    """One way, as it turned out.

    Attributes:
        prepare_seconds: compilation, or the first steps' extra time; None where nothing is prepared.
        milliseconds: median of a decode step.
        error: why there are no numbers.
    """

    name: str
    what: str
    prepare_seconds: float | None = None
    milliseconds: float | None = None
    error: str = ""


WAYS = {
    "hf-dynamic": "HF eager, its growing cache: what `generate` runs",
    "hf-static": "HF eager, static cache",
    "compile": "torch.compile of the HF model over a static cache, without gating",
    "compile-frozen": "torch.compile with inductor's freezing and cpp_wrapper, static cache, without gating",
    "ours-eager-none": "HF layers over our paged cache, packed base weights, no gates",
    "ours-eager-top2": "HF layers over our paged cache, packed base weights, every row its own pair of experts",
    "ours-native-none": "our compiled C++ layers, no gates",
    "ours-native-top2": "our compiled C++ layers, every row its own pair of experts",
}


def main() -> None:
    """Try them all, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"))
    parser.add_argument("--out", type=Path, default=_RESULTS / "ways.json")
    parser.add_argument("--only", default=",".join(WAYS), help="ways, separated by commas")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of each")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured decode steps")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(_measure(arguments.way, arguments.bundle, arguments.steps)))
        return
    chosen = arguments.only.split(",")
    found = {entry["name"]: entry for entry in _earlier(arguments.out)}
    for name in WAYS:
        if name in chosen:
            way = _try(name, arguments)
            print(_row(asdict(way)), flush=True)
            found[name] = asdict(way)
    _write(arguments.out, [found[name] for name in WAYS if name in found])


def _try(name: str, arguments: argparse.Namespace) -> Way:
    command = [sys.executable, "-m", "benchmarks.ways", "--way", name]
    command += ["--bundle", str(arguments.bundle), "--steps", str(arguments.steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, check=False)
    except subprocess.TimeoutExpired:
        return Way(name, WAYS[name], error=f"not done after {arguments.limit:.0f} s")
    if done.returncode:
        return Way(name, WAYS[name], error=done.stderr.strip().splitlines()[-1][:300])
    prepare, step = json.loads(done.stdout.splitlines()[-1])
    return Way(name, WAYS[name], prepare, step)


def _measure(name: str, bundle: Path, steps: int) -> tuple[float | None, float]:
    """Seconds of preparation, milliseconds of a step."""
    kind, _, variant = name.partition("-")
    if kind == "ours":
        native, _, gates = variant.partition("-")
        return _ours(bundle, steps, native == "native", gates)
    return _plain(bundle / "shared", steps, name)


def _ours(path: Path, steps: int, native: bool, gates: Any) -> tuple[None, float]:
    from benchmarks.alone import EngineAlone, defaults
    from benchmarks.workload import Load
    from experts.bundle import Bundle

    options = replace(defaults(), mode="factored")
    options = replace(options, model=replace(options.model, native="on" if native else "off"))
    engine = EngineAlone.of_bundle(Bundle.open(path), options)
    load = Load(tuple(engine.experts), engine.vocabulary, kind=gates, prompt_tokens=CONTEXT, new_tokens=steps)
    engine.run(replace(load, new_tokens=4).requests(BATCH, 0), BATCH)
    run = engine.run(load.requests(BATCH, 1), BATCH)
    return None, 1000 * statistics.median(run.decode_seconds(BATCH))


@torch.no_grad()
def _plain(path: Path, steps: int, name: str) -> tuple[float | None, float]:
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.train(False)
    longest = CONTEXT + steps + 8
    cache: Any = (
        DynamicCache(config=model.config)
        if name == "hf-dynamic"
        else StaticCache(config=model.config, max_cache_len=longest)
    )

    def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    ids = torch.randint(100, model.config.vocab_size, (BATCH, CONTEXT))
    token = forward(ids, torch.arange(CONTEXT)[None]).argmax(-1, keepdim=True)
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = forward
    if name.startswith("compile"):
        if name == "compile-frozen":
            from torch._inductor import config

            config.freezing = True
            config.cpp_wrapper = True
        step = torch.compile(forward)
    times = []
    for number in range(4 + steps):
        started = time.perf_counter()
        position = torch.tensor([[CONTEXT + number]])
        token = step(token, position).argmax(-1, keepdim=True)
        times.append(time.perf_counter() - started)
    prepared, measured = times[:4], statistics.median(times[4:])
    extra = sum(prepared) - len(prepared) * measured if name.startswith("compile") else None
    return extra, 1000 * measured


def _earlier(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["ways"]
    return found


def _write(path: Path, ways: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    report = {"machine": about, "commit": commit(), "ways": ways}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [
        "# Ways tried for the decode step",
        "",
        f"Embedded model (SmolLM2-135M), batch {BATCH}, {CONTEXT} tokens of context and up, bfloat16; "
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}; commit {report['commit']}. "
        "Made by `python -m benchmarks.ways`; each way once, median over its steps.",
        "",
        "| way | prepared in | ms a step | |",
        "|---|---|---|---|",
        *map(_row, ways),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(way: dict[str, Any]) -> str:
    prepared = "" if way["prepare_seconds"] is None else f"{way['prepare_seconds']:.0f} s"
    step = "failed" if way["milliseconds"] is None else f"{way['milliseconds']:.1f}"
    error = way["error"].replace("|", "\\|")
    return f"| {way['what']} | {prepared} | {step} | {error} |"


if __name__ == "__main__":
    main()
