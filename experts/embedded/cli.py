"""`twinserve embedded …`: retrain and measure the default family from its data packages."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experts.embedded.build import build
from experts.embedded.family import Family

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
    return app


def train(
    family: Annotated[Family, typer.Option(help="Which experts, on which base.")] = Family.SHIPPED,
    target: Annotated[Path | None, typer.Option(help="Folder for the LoRA folders; the family's.")] = None,
    work: Work = WORK,
    only: Annotated[list[str] | None, typer.Option(help="Train these skills only.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps an expert; those shipped if left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of factors and batches; the one shipped.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; two processes of one do most.")] = None,
) -> None:
    """Train every expert that is not there yet, by the family's recipe; stop and start as you like."""
    import torch
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from experts.embedded.courses import WEAKER_BASE, course
    from experts.embedded.train import train_family
    from experts.embedded.weaker import ensure_weaker

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = course(family)
    base = ensure_weaker(WEAKER_BASE, work) if chosen.on_weaker_base else None
    changes = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
    lessons = [lesson for lesson in chosen.lessons if not only or lesson.name in only]
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for lesson in lessons:
            recipe = replace(chosen.recipe(lesson.name), **changes)
            for folder in train_family([lesson], target or chosen.target, work, recipe, progress, base):
                progress.console.print(f"{folder}")


def prompts(
    family: Annotated[Family, typer.Option(help="Whose prompts.")] = Family.SHIPPED,
    target: Annotated[Path, typer.Option(help="Folder for the .jsonl files.")] = PROMPTS,
    work: Work = WORK,
) -> None:
    """Write a family's routing prompts (for the shipped one, the same lines as those committed)."""
    from experts.embedded.courses import course
    from experts.embedded.prompts import write_prompts

    for lesson in course(family).lessons:
        typer.echo(write_prompts(lesson, target, work / "downloads"))
