"""The same merges by mergekit and by us, tensor by tensor.

    python -m venv /tmp/mk/.venv && /tmp/mk/.venv/bin/pip install mergekit==0.1.5
    python -m benchmarks.quality.mergekit_check --python /tmp/mk/.venv/bin/python

A made-up Llama in float32 and three full fine-tunes that share a part of their change. Methods without
chance are compared entry by entry, those with chance at drop rate 0, and by what they keep at 0.5.
Writes benchmarks/results/mergekit.json and mergekit.md.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experts.checkpoint import Checkpoint, FineTune, open_fine_tune
from experts.factors import dense
from experts.merging import (
    Averaging,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    MergeMethod,
    ModelStock,
    Sce,
    TaskArithmetic,
    Ties,
    merge,
)

RESULTS = Path(__file__).parent.parent / "results"
HIDDEN, INNER, VOCABULARY, LAYERS, TASKS = 64, 128, 256, 2, 3
HALF = 0.5


@dataclass(frozen=True)
class Case:
    """One method, said to both sides; `overall` and `each` are mergekit's parameters, `chance` its kind."""

    name: str
    theirs: str
    ours: MergeMethod
    overall: Mapping[str, Any]
    each: Mapping[str, Any]
    note: str = ""


EXACT = (
    Case("averaging", "linear", Averaging(), {}, {"weight": 1.0}),
    Case("task-arithmetic", "task_arithmetic", TaskArithmetic(scale=0.3), {"lambda": 0.3}, {"weight": 1.0}),
    Case(
        "ties",
        "ties",
        Ties(density=0.25, trim="tensor", scale=0.7),
        {"lambda": 0.7},
        {"weight": 1.0, "density": 0.25},
        "trimmed tensor by tensor as mergekit does; our default trims the whole task vector as the paper does",
    ),
    Case(
        "dare",
        "dare_linear",
        Dare(drop_rate=0, scale=0.3),
        {"lambda": 0.3},
        {"weight": 1.0, "density": 1.0},
        "at drop rate 0",
    ),
    Case(
        "dare-ties",
        "dare_ties",
        DareTies(drop_rate=0, density=1, scale=0.7),
        {"lambda": 0.7, "normalize": True},
        {"weight": 1.0, "density": 1.0},
        "at drop rate 0; normalize is on for the paper's disjoint mean",
    ),
    Case(
        "breadcrumbs",
        "breadcrumbs",
        Breadcrumbs(density=0.25, outliers=0.0625, scale=0.3),
        {"lambda": 0.3},
        {"weight": 1.0, "density": 0.25, "gamma": 0.0625},
    ),
    Case(
        "breadcrumbs, election",
        "breadcrumbs_ties",
        Breadcrumbs(density=0.25, outliers=0.0625, election=True, scale=0.7),
        {"lambda": 0.7, "normalize": True},
        {"weight": 1.0, "density": 0.25, "gamma": 0.0625},
        "normalize is on for the disjoint mean",
    ),
    Case(
        "della",
        "della",
        Della(drop_rate=0, epsilon=0, scale=0.7),
        {"lambda": 0.7},
        {"weight": 1.0, "density": 1.0},
        "at drop rate 0",
    ),
    Case(
        "della, no election",
        "della_linear",
        Della(drop_rate=0, epsilon=0, election=False, scale=0.3),
        {"lambda": 0.3},
        {"weight": 1.0, "density": 1.0},
        "at drop rate 0",
    ),
    Case("sce", "sce", Sce(density=0.25), {"select_topk": 0.25}, {}),
    Case(
        "model-stock",
        "model_stock",
        ModelStock(),
        {},
        {},
        "at acute angles; at obtuse ones we stay at the base, where mergekit steps behind it",
    ),
)

RANDOM = (
    Case("dare", "dare_linear", Dare(drop_rate=HALF, scale=1), {}, {"weight": 1.0, "density": HALF}),
    Case(
        "della",
        "della_linear",
        Della(drop_rate=HALF, epsilon=0.6, election=False, scale=1),
        {},
        {"weight": 1.0, "density": HALF, "epsilon": 0.3},
        "mergekit's epsilon is half of ours, which is the paper's",
    ),
)


@dataclass(frozen=True)
class Moments:
    """What a method with chance keeps of one fine-tune's matrices, smaller and larger half of each row."""

    kept_small: float
    kept_large: float
    mean_ratio: float

    def __str__(self) -> str:
        return f"{self.kept_small:.3f} / {self.kept_large:.3f} / {self.mean_ratio:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with mergekit")
    python = parser.parse_args().python
    version = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('mergekit'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        report = compare(python, Path(folder))
    report = {"mergekit": version, "torch": torch.__version__, **report}
    (RESULTS / "mergekit.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / "mergekit.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


def compare(python: str, folder: Path) -> dict[str, Any]:
    """Merge every case on both sides."""
    base, fine_tunes = made_up_family(folder)
    jobs = [
        *(mergekit_job(case, fine_tunes, folder / f"exact-{n}") for n, case in enumerate(EXACT)),
        *(mergekit_job(case, fine_tunes[:1], folder / f"random-{n}") for n, case in enumerate(RANDOM)),
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    runner = Path(__file__).with_name("mergekit_runner.py")
    subprocess.run([python, str(runner), str(folder / "jobs.json")], check=True, cwd=folder)
    exact, random = [], []
    for number, case in enumerate(EXACT):
        theirs = read_change(base, folder / f"exact-{number}")
        if not any(change.any() for change in theirs.values()):
            raise SystemExit(f"{case.theirs} changed nothing; the comparison would be empty")
        ours = our_change(base, fine_tunes, case.ours)
        worst = max(
            float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12))
            for name in base.names
        )
        exact.append({"method": case.name, "mergekit": case.theirs, "difference": worst, **described(case)})
    for number, case in enumerate(RANDOM):
        theirs = read_change(base, folder / f"random-{number}")
        ours = our_change(base, fine_tunes[:1], case.ours)
        random.append(
            {
                "method": case.name,
                "mergekit": case.theirs,
                "ours": asdict(moments(base, fine_tunes[0], ours)),
                "theirs": asdict(moments(base, fine_tunes[0], theirs)),
                **described(case),
            }
        )
    return {"model": f"Llama {LAYERS}×{HIDDEN}, {TASKS} full fine-tunes", "exact": exact, "random": random}


def made_up_family(folder: Path) -> tuple[Checkpoint, list[FineTune]]:
    """A base and its fine-tunes; half of each change is common to all."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{kind}_proj.weight": (HIDDEN, HIDDEN) for kind in "qkvo"}
        shapes |= {f"{at}.mlp.{kind}_proj.weight": (INNER, HIDDEN) for kind in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{at}.{kind}_layernorm.weight": (HIDDEN,) for kind in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)

    def drawn(size: float) -> dict[str, Tensor]:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    weights, common = drawn(1.0), drawn(0.1)
    write(folder / "base", weights)
    base = Checkpoint.open(folder / "base")
    fine_tunes = []
    for task in range(TASKS):
        own = drawn(0.1)
        write(folder / f"task{task}", {n: weights[n] + common[n] + own[n] for n in weights})
        fine_tunes.append(open_fine_tune(f"task{task}", folder / f"task{task}", base))
    return base, fine_tunes


def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


def mergekit_job(case: Case, fine_tunes: Sequence[FineTune], out: Path) -> dict[str, Any]:
    base = str(fine_tunes[0].path.parent / "base")
    models: list[dict[str, Any]] = [
        {"model": str(each.path), "parameters": dict(case.each)} for each in fine_tunes
    ]
    config: dict[str, Any] = {
        "merge_method": case.theirs,
        "models": models,
        "parameters": dict(case.overall),
        "dtype": "float32",
    }
    if case.theirs != "linear":
        config["base_model"] = base
    return {"config": config, "out": str(out)}


def read_change(base: Checkpoint, folder: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    return {name: merged[name] - base.tensor(name) for name in base.names}


def our_change(base: Checkpoint, fine_tunes: Sequence[FineTune], method: MergeMethod) -> dict[str, Tensor]:
    """Our merge, rounded to the model's dtype as a written model is."""
    change = {}
    for name, delta in merge(base, fine_tunes, method):
        weight = base.tensor(name)
        change[name] = torch.zeros_like(weight) if delta is None else (weight + dense(delta)) - weight
    return change


def moments(base: Checkpoint, fine_tune: FineTune, merged: Mapping[str, Tensor]) -> Moments:
    small, large, ratios = [], [], []
    for name in base.names:
        delta = fine_tune.delta(name)
        if delta is None or len(delta.shape) < 2:
            continue
        delta = dense(delta)
        kept = (merged[name] != 0).float()
        kept = kept.gather(1, delta.abs().argsort(dim=1))
        half = kept.shape[1] // 2
        small.append(kept[:, :half].flatten())
        large.append(kept[:, half:].flatten())
        ratios.append((merged[name] * delta).sum() / (delta * delta).sum())
    return Moments(
        float(torch.cat(small).mean()), float(torch.cat(large).mean()), float(torch.stack(ratios).mean())
    )


def described(case: Case) -> dict[str, Any]:
    return {"parameters": case.ours.model_dump(exclude={"method"}), "note": case.note}


def markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"# Merges against mergekit {report['mergekit']}",
        "",
        f"{report['model']}, float32. Made by `python -m benchmarks.quality.mergekit_check --python PYTHON`.",
        "The difference is the largest of any entry, as part of the tensor's largest change; rounding of the",
        "written float32 weights alone is about 1e-6.",
        "",
        "| method | mergekit's name | largest relative difference | note |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['mergekit']} | {row['difference']:.1e} | {row['note']} |"
        for row in report["exact"]
    ]
    lines += [
        "",
        f"Methods with chance, drop rate {HALF} on one fine-tune: share kept of each row's smaller and larger",
        "half, and ⟨merged, δ⟩ / ⟨δ, δ⟩, which is 1 where the expectation is kept. mergekit rescales a tensor to",
        "its L1 norm, we divide each entry by its own probability of being kept, as the papers do.",
        "",
        "| method | ours | mergekit | note |",
        "|---|---|---|---|",
    ]
    for row in report["random"]:
        ours, theirs = Moments(**row["ours"]), Moments(**row["theirs"])
        lines.append(f"| {row['method']} | {ours} | {theirs} | {row['note']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
