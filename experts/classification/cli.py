"""`twinserve classifier …`: build a classifier bundle of your own classifiers, or train and build the suite's."""

from pathlib import Path
from typing import Annotated

import typer

from experts.cli_options import pairs
from experts.errors import BundleError

CLASSIFIERS = Path(".twinserve/quality/classifiers")
WORK = Path("build/embedded")
BUNDLE = Path(".twinserve/classifier")

Named = Annotated[list[str] | None, typer.Option(help="name=PATH; repeat it for every expert.")]


def build_app() -> typer.Typer:
    """The sub-application; heavy imports wait until a command runs."""
    app = typer.Typer(help=__doc__, no_args_is_help=True)
    app.command("build")(build)
    app.command("train")(train)
    app.command("inspect")(inspect)
    return app


def build(
    base: Annotated[
        Path | None,
        typer.Option(help="Encoder that the classifiers were trained from; the suite's if left out."),
    ] = None,
    expert: Named = None,
    texts: Named = None,
    out: Annotated[Path, typer.Option(help="The bundle's folder to be.")] = BUNDLE,
    name: Annotated[str, typer.Option(help="Model name that asks the router.")] = "classifier",
    scale: Annotated[float | None, typer.Option(help="Task arithmetic's λ.")] = None,
    rank: Annotated[int | None, typer.Option(help="Singular values kept of each matrix.")] = None,
    max_texts: Annotated[
        int | None, typer.Option(help="Texts of each expert and split for the router.")
    ] = None,
    classifiers: Annotated[Path, typer.Option(help="The suite's trained classifiers.")] = CLASSIFIERS,
    work: Annotated[Path, typer.Option(help="Folder for the suite's downloads.")] = WORK,
    overwrite: Annotated[bool, typer.Option(help="Replace a classifier bundle that is there.")] = False,
) -> None:
    """Merge the encoders of sequence classifiers and keep what each has of its own, head included.

    With --base and --expert: folders saved by save_pretrained, and --texts name=FILE with a JSON object a line
    ({"prompt": …}) for the router. Without: the suite's eight tasks, trained before.
    """
    from dataclasses import replace

    from experts.classification.build import ClassifierPlan, build_classifier
    from experts.classification.suite_plan import suite_plan
    from experts.classification.tasks.suite import suite
    from experts.cli import reported_errors
    from experts.compression import CompressionSpec
    from experts.merging.methods import TaskArithmetic
    from experts.routing import load_prompts

    _quiet()
    with reported_errors():
        if expert:
            if base is None:
                raise BundleError("--expert needs --base, the encoder that it was trained from")
            prompts = {key: load_prompts(path) for key, path in pairs("--texts", texts).items()}
            plan = ClassifierPlan(base=base, experts=pairs("--expert", expert), out=out, texts=prompts)
        else:
            plan = suite_plan(suite(), classifiers, work / "downloads", out)
        plan = replace(plan, name=name, overwrite=overwrite)
        if scale is not None:
            plan = replace(plan, method=TaskArithmetic(scale=scale))
        if rank is not None:
            plan = replace(plan, compression=CompressionSpec(rank=rank, extras="exact"))
        if max_texts is not None:
            plan = replace(plan, max_texts=max_texts)
        bundle = build_classifier(plan, lambda line: typer.echo(line, err=True))
    typer.echo(bundle.path)


def train(
    target: Annotated[Path, typer.Option(help="Folder of the classifiers.")] = CLASSIFIERS,
    work: Annotated[Path, typer.Option(help="Folder for downloads.")] = WORK,
    only: Annotated[list[str] | None, typer.Option(help="Train these tasks only.")] = None,
) -> None:
    """Train the suite's classifiers that are not there yet; stop and start again as you like."""
    from experts.classification.base import find_base
    from experts.classification.tasks.suite import suite
    from experts.classification.train import Recipe, train_suite
    from experts.cli import reported_errors

    _quiet()
    with reported_errors():
        tasks = [task for task in suite() if not only or task.name in only]
        for folder in train_suite(tasks, find_base(), target, work / "downloads", Recipe(), typer.echo):
            typer.echo(folder)


def inspect(bundle: Annotated[Path, typer.Argument(help="Folder of a classifier bundle.")]) -> None:
    """Print what a classifier bundle holds."""
    from experts.classification.bundle import ClassifierBundle
    from experts.cli import reported_errors

    with reported_errors():
        opened = ClassifierBundle.open(bundle)
        manifest, router = opened.manifest, opened.router()
    typer.echo(f"{manifest.name}: {manifest.base.architecture}, {manifest.merge.method.model_dump_json()}")
    for name in opened.expert_names():
        entry = manifest.experts[name]
        typer.echo(
            f"  {name}: {len(entry.labels)} labels, rank {entry.summary.rank_max}, {entry.nbytes} bytes "
            f"({entry.nbytes / manifest.base.nbytes:.2%} of the encoder), error {entry.summary.relative_error:.3f}"
        )
    typer.echo(f"  router: {router.kind if router else 'none'}")


def _quiet() -> None:
    """Without transformers' bars, and its warning that a head is new: it is meant to be."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
