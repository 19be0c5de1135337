"""What all commands share: where the server is, how errors and answers are told."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.control import strip_control_codes
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from service.remote.jobs import Job
from service.remote.server import RemoteError, Server

URL_VARIABLE = "TWINSERVE_URL"
"""Says where the server is; nothing of the server reads it."""

Url = Annotated[
    str,
    typer.Option("--url", envvar=URL_VARIABLE, help="Root of the running server."),
]
Key = Annotated[
    str,
    typer.Option("--key", envvar="TWINSERVE_ADMIN_KEY", help="The server's admin key.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Name = Annotated[str, typer.Argument(help="Name of the expert.", show_default=False)]
Expected = Annotated[
    int | None,
    typer.Option("--if", min=1, help="Only if this generation is the current one.", show_default=False),
]
DEFAULT_URL = "http://127.0.0.1:8000"

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def usage(message: str) -> typer.Exit:
    """To be raised: the command was not called right."""
    Console(stderr=True).print(Text(f"error: {message}", style="bold red"), soft_wrap=True)
    return typer.Exit(USAGE)


@contextlib.contextmanager
def connected(url: str, key: str, as_json: bool) -> Iterator[Server]:
    """The server; its refusals become one line, or one JSON object, and exit code 1."""
    if not url.startswith(("http://", "https://")):
        raise usage(f"--url {url!r} is no http:// or https:// URL")
    server = Server(url, key)
    try:
        yield server
    except RemoteError as error:
        if as_json:
            tell(error.fields())
        else:
            complain(error.message)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    finally:
        server.close()


def complain(message: str) -> None:
    """One line on standard error; whatever it holds is text, not markup and no terminal's command."""
    line = Text("error: ", style="bold red").append(Text(plain(message), style="default"))
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def plain(text: object) -> str:
    """Without characters that a terminal would obey."""
    return "".join(char for char in strip_control_codes(str(text)) if char.isprintable() or char in "\n\t")


def tell(answer: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(answer, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def transfer(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def job_bar() -> Iterator[Callable[[Job], None]]:
    """A job's stage, percent, parameter at hand and time left, on standard error."""
    columns = (
        TextColumn("{task.description}", table_column=Column(width=9)),
        BarColumn(bar_width=18),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}", table_column=Column(width=8)),
        TextColumn(
            "{task.fields[tensor]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, expand=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("queued", total=100, tensor="", left="")

        def show(job: Job) -> None:
            eta = job.get("eta_seconds")
            stage = job.get("stage") or job["state"]
            progress.update(
                task,
                description="stopping" if job.get("cancelling") else plain(stage)[:9],
                completed=float(job.get("percent") or 0.0),
                tensor=_short(plain(job.get("tensor") or "")),
                left="" if eta is None else f"{float(eta):.0f} s left",
            )

        yield show


def _short(parameter: str) -> str:
    """The end of a parameter's name, which tells it from its siblings."""
    return parameter.removesuffix(".weight").removeprefix("model.")
