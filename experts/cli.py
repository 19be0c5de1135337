"""`twinserve build`, `inspect` and `export-lora`: thin shells around `build_bundle`, `Bundle.open`, `write_lora`."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experts.classification import cli as classifier_cli
from experts.cli_options import Method, compression_spec, merge_method, pairs, router_features
from experts.errors import ExpertsError

USAGE_ERROR = 2

_STAGES = {
    "base": "embedded base",
    "tune": "tune the scale",
    "trim": "trimming thresholds",
    "merge": "shared expert",
    "experts": "exclusive vectors",
    "features": "router features",
    "router": "router",
    "finish": "write and verify",
}


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("build")(build)
    app.command("inspect")(inspect)
    app.command("export-lora")(export_lora)
    app.add_typer(classifier_cli.build_app(), name="classifier")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print an `ExpertsError` as one line and end with exit code 2; bugs keep their traceback."""
    try:
        yield
    except ExpertsError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        raise typer.Exit(USAGE_ERROR) from error


@contextlib.contextmanager
def build_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback for `build_bundle` that shows one bar a stage on standard error."""
    from transformers.utils import logging

    # Its bars would fight with ours for the terminal.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(_STAGES.get(stage, stage))
            progress.update(bars[stage], completed=done, total=total or None)

        yield show


def build(
    base: Annotated[Path, typer.Option(help="Folder of the base model (safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    expert: Annotated[
        list[str] | None, typer.Option(help="name=DIR of a LoRA or full fine-tune; once for every expert.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="name=FILE.jsonl of an expert's prompts; once for every expert.")
    ] = None,
    name: Annotated[str, typer.Option(help="The bundle's name; clients use it as the model.")] = "twin",
    method: Annotated[
        Method, typer.Option(help="Static merge that makes the shared expert.")
    ] = "task-arithmetic",
    scale: Annotated[float | None, typer.Option(help="The merge's λ.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Fraction of entries that TIES, Breadcrumbs or SCE keeps.")
    ] = None,
    trim: Annotated[
        Literal["model", "tensor"] | None,
        typer.Option(help="Over what TIES takes its fraction: the whole task vector, or each tensor."),
    ] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Fraction that DARE or DELLA drops.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="DELLA: how far drop rates differ between a row's ends.")
    ] = None,
    outliers: Annotated[
        float | None, typer.Option(help="Breadcrumbs: fraction of largest entries that is masked.")
    ] = None,
    election: Annotated[
        bool | None,
        typer.Option(
            "--election/--no-election", help="Breadcrumbs, DELLA: elect signs as TIES does, or just add."
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="TSV: part of the rank that each expert keeps (default: 1/experts).")
    ] = None,
    merge_seed: Annotated[int | None, typer.Option(help="Seed of DARE and DELLA.")] = None,
    tune: Annotated[
        bool, typer.Option(help="Choose λ on validation prompts with answers: lowest loss with oracle gates.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Rank kept of each matrix (default: 16).")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: energy kept of each matrix, in (0, 1].")
    ] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Instead: bytes of each expert.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32", "int8", "int4", "mixed"],
        typer.Option(help="Stored form of the factors; mixed: by singular value, under --budget-bytes."),
    ] = "bfloat16",
    allocation: Annotated[
        Literal["energy", "activation"],
        typer.Option(help="What is kept: most of the weights' energy, or of the outputs on the prompts."),
    ] = "energy",
    extras: Annotated[
        Literal["fold", "exact"],
        typer.Option(help="Biases, norms, embeddings, heads: in the shared expert alone, or kept for each."),
    ] = "fold",
    router: Annotated[
        Literal["mlp", "gaussian", "nearest", "staged", "subspace", "none"],
        typer.Option(
            help="Its kind. subspace: by weights, no prompts needed; none: requests name their experts."
        ),
    ] = "mlp",
    router_layer: Annotated[
        int, typer.Option(help="Decoder layer that the router reads, from 1; -1: the last, after the norm.")
    ] = -1,
    router_tap: Annotated[
        list[int] | None, typer.Option(help="A layer below it that the router reads too; once for each.")
    ] = None,
    guard_rate: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.5, help="Share of held-out prompts that may be left to the shared expert as unknown."
        ),
    ] = None,
    router_pace: Annotated[
        Literal["constant", "batch", "focal"],
        typer.Option(
            help="What mlp and staged learn most from: all prompts alike, hard batches, or prompts badly known."
        ),
    ] = "constant",
    top_k: Annotated[int, typer.Option(min=1, help="Gates that the router keeps by default.")] = 2,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Gates below it are dropped by default.")
    ] = 0.05,
    max_prompts: Annotated[
        int, typer.Option(min=1, help="Most router prompts of an expert and split.")
    ] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the router's fit.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle that is there.")] = False,
) -> None:
    """Build a bundle from a base and its fine-tunes."""
    with reported_errors():
        experts, prompt_files = pairs("--expert", expert), pairs("--prompts", prompts)
        chosen = {
            "scale": scale,
            "density": density,
            "trim": trim,
            "drop_rate": drop_rate,
            "epsilon": epsilon,
            "outliers": outliers,
            "election": election,
            "fraction": fraction,
            "seed": merge_seed,
        }
        sizes = {"rank": rank, "energy": energy, "budget_bytes": budget_bytes}
        spec = compression_spec(sizes, dtype, extras, allocation)
        merging = merge_method(method, chosen)
        features = router_features(router_layer, router_tap or ())

        from experts.build import BuildPlan, build_bundle
        from experts.routing.training import Pace

        plan = BuildPlan(
            base=base,
            experts=experts,
            out=out,
            name=name,
            method=merging,
            compression=spec,
            prompts=prompt_files,
            router=router,
            features=features,
            guard_rate=guard_rate,
            pace=Pace(router_pace),
            top_k=top_k,
            threshold=threshold,
            max_prompts=max_prompts,
            tune=tune,
            seed=seed,
            overwrite=overwrite,
        )
        with build_progress() as progress:
            bundle = build_bundle(plan, progress)

        from experts.inspection import bundle_table

        Console().print(bundle_table(bundle))


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with every digest.")] = False,
    verify: Annotated[bool, typer.Option(help="Check every file against its digest first.")] = True,
) -> None:
    """Show what is in a bundle: experts, ranks, bytes, errors, method, digests."""
    with reported_errors():
        from experts.bundle import Bundle
        from experts.inspection import bundle_facts, bundle_table

        opened = Bundle.open(bundle, verify=verify)
        if as_json:
            typer.echo(json.dumps(bundle_facts(opened), indent=1, ensure_ascii=False))
        else:
            Console().print(bundle_table(opened))


def export_lora(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    base: Annotated[Path, typer.Option(help="Folder of the base that it was built from.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter to write.")],
    rank: Annotated[
        int, typer.Option(min=1, help="Of every matrix; exact from the sum of the experts' ranks on.")
    ] = 16,
) -> None:
    """Write a bundle's shared expert as one LoRA of its base, for servers that know nothing of bundles."""
    with reported_errors():
        from experts.bundle import Bundle
        from experts.checkpoint import Checkpoint
        from experts.errors import MismatchError
        from experts.merging.lora_export import write_lora

        opened, weights = Bundle.open(bundle, verify=False), Checkpoint.open(base)
        if weights.fingerprint() != opened.manifest.base.fingerprint:
            raise MismatchError(f"{base} is not the base that {bundle} was built from; give that one")
        deltas = ((name, opened.base_delta.delta(name)) for name in weights.names)
        write_lora(weights, deltas, out, rank)
        typer.echo(f"{out}: the shared expert of {opened.manifest.name}, a LoRA of rank {rank}")
