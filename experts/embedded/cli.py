"""`twinserve embedded …`: retrain and measure the default family from its data packages."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experts.embedded.build import build

Factors = Annotated[Path, typer.Option(help="Folder of the experts' LoRA folders.")]
Work = Annotated[Path, typer.Option(help="Folder for base, downloads and checkpoints.")]

FACTORS = Path("experts/embedded/factors")
PROMPTS = Path("experts/embedded/prompts")
WORK = Path("build/embedded")


def build_app() -> typer.Typer:
    """The sub-application; heavy imports wait until a command runs."""
    app = typer.Typer(help=__doc__, no_args_is_help=True)
    app.command("build")(build)
    app.command("train")(train)
    app.command("prompts")(prompts)
    app.command("evaluate")(evaluate)
    return app


def train(
    target: Factors = FACTORS,
    work: Work = WORK,
    only: Annotated[list[str] | None, typer.Option(help="Train these skills only.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps an expert; those shipped if left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of factors and batches; the one shipped.")] = None,
) -> None:
    """Train every expert that is not there yet, as it is shipped; stop and start again as you like."""
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from experts.embedded.family import family
    from experts.embedded.train import shipped_recipe, train_family

    changes = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
    skills = [skill for skill in family() if not only or skill.name in only]
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for skill in skills:
            recipe = replace(shipped_recipe(skill.name), **changes)
            for folder in train_family([skill], target, work, recipe, progress):
                progress.console.print(f"{folder}")


def prompts(
    target: Annotated[Path, typer.Option(help="Folder for the .jsonl files.")] = PROMPTS,
    work: Work = WORK,
) -> None:
    """Write the routing prompts again (the same lines as those committed)."""
    from experts.embedded.family import family
    from experts.embedded.prompts import write_prompts

    for skill in family():
        typer.echo(write_prompts(skill, target, work / "downloads"))


def evaluate(
    factors: Factors = FACTORS,
    work: Work = WORK,
    output: Annotated[Path, typer.Option(help="Folder for methods.json and methods.md.")] = WORK,
    validation: Annotated[int, typer.Option(help="Validation questions a task, for tuning.")] = 64,
    test: Annotated[int, typer.Option(help="Test questions a task.")] = 200,
    rank: Annotated[list[int] | None, typer.Option(help="Ranks of Twin; 16 if left out.")] = None,
) -> None:
    """Measure base, experts, static merges and Twin with oracle gates; about half an hour."""
    from experts.embedded.evaluate import evaluate_family

    table = evaluate_family(factors, work, output, validation, test, tuple(rank or (16,)), typer.echo)
    typer.echo(table.to_markdown())
