"""`twinserve eval …`: measure merges, compression and routing of the embedded experts; a run can be resumed."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from experts.evaluation.runner import Report, Unit
    from experts.evaluation.studies.options import Options

STUDIES = ("tables", "scale", "bytes")
STORE = "cells.jsonl"


def evaluate(
    studies: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(STUDIES)}; or report.")],
    work: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path(".twinserve/eval"),
    base: Annotated[Path, typer.Option(help="Folder with the converted base and the downloads.")] = Path(
        "build/embedded"
    ),
    quality: Annotated[Path, typer.Option(help="Folder of the experts trained for studies.")] = Path(
        ".twinserve/quality"
    ),
    setting: Annotated[
        list[str] | None, typer.Option(help="Only on embedded, twenty, strong or weak.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Test questions of each task.")] = 100,
    validation: Annotated[int, typer.Option(min=1, help="Validation questions that tuning reads.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of experts.")] = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Router prompts of each expert.")] = 60,
    guard: Annotated[
        float,
        typer.Option(
            min=0, max=0.5, help="Rate of false abstention that routers' guards are set at; 0: none."
        ),
    ] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")] = 2,
    only: Annotated[
        list[str] | None, typer.Option(help="Only rows whose study/setting/row contains this text.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("benchmarks/quality"),
) -> None:
    """Measure studies, or make their tables again (`report`)."""
    from experts.cli import reported_errors

    with reported_errors():
        from experts.errors import EvaluationError
        from experts.evaluation.studies.options import Options

        unknown = [name for name in studies if name not in (*STUDIES, "report")]
        if unknown:
            raise EvaluationError(
                f"there is no study {unknown[0]!r}; choose among {', '.join(STUDIES)}, report"
            )
        options = Options(
            items=items, validation=validation, seeds=seeds, prompts=prompts, guard=guard or None
        )
        for study in studies:
            if study != "report":
                _measure(study, options, work, base, quality, setting or (), workers, only or ())
        if "report" in studies:
            _report(work / STORE, out)


def _measure(
    study: str,
    options: "Options",
    work: Path,
    base: Path,
    quality: Path,
    chosen: Sequence[str],
    workers: int,
    only: Sequence[str],
) -> None:
    """Run what is missing of one study, with progress on standard error."""
    from experts.embedded.settings import embedded_settings
    from experts.errors import EvaluationError
    from experts.evaluation.runner import run_stages
    from experts.evaluation.store import Store
    from experts.evaluation.studies import scale, sizes, tables
    from experts.evaluation.studies.options import references

    plans = {
        "tables": (tables.plan, ("embedded",)),
        "scale": (scale.plan, ("strong", "weak")),
        "bytes": (sizes.plan, ("embedded",)),
    }
    plan, usual = plans[study]
    settings = embedded_settings(chosen or usual, base, quality, options.validation, options.items)
    if not settings:
        raise EvaluationError(f"{study}: {quality} has fewer than two experts; train them first")
    stages = [references(settings, options), _selected(plan(settings, options), only)]
    store = Store(work / STORE)
    with store.owned(), _progress(study, stages) as report:
        run_stages(stages, settings, store, workers, report)


def _selected(units: "Sequence[Unit]", only: Sequence[str]) -> "list[Unit]":
    """The jobs whose name contains one of the texts; all of them if there are none."""
    kept = [
        tuple(
            job
            for job in unit
            if not only or any(text in f"{job.study}/{job.setting}/{job.row}" for text in only)
        )
        for unit in units
    ]
    return [unit for unit in kept if unit]


@contextlib.contextmanager
def _progress(study: str, stages: "Sequence[Sequence[Unit]]") -> "Iterator[Report]":
    """Items done of those that there may be, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from experts.evaluation.store import Cell

    total = sum(job.cost for stage in stages for unit in stage for job in unit)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        bar = progress.add_task(study, total=total)

        def report(cell: Cell | None, cost: int) -> None:
            progress.advance(bar, cost)
            if cell is not None:
                about = cell.parameters
                progress.console.print(
                    f"{about['study']}/{about['setting']} {about['row']} seed {about['seed']} "
                    f"experts {len(about['experts'])} {about['split']} {about['task']}: "
                    f"{100 * cell.score.mean:.1f} % of {cell.score.count}, {cell.facts['cpu_seconds']:.1f} s",
                    highlight=False,
                )

        yield report


def _report(store: Path, out: Path) -> None:
    """Write the tables of every study that has cells.

    Raises:
        EvaluationError: none has.
    """
    from experts.errors import EvaluationError
    from experts.evaluation.store import Store
    from experts.evaluation.summaries import write_tables

    written = write_tables(Store(store), out)
    if not written:
        raise EvaluationError(
            f"{store} holds nothing that was measured; run a study first, or give its --work"
        )
    for path in written:
        typer.echo(path)
