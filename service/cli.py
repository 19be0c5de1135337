"""`twinserve …`: serve a bundle; build, inspect and retrain through the commands of `experts`.

Heavy imports wait until a command runs, so that `--help` is quick.
"""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts import cli as experts_cli
from experts.embedded import cli as embedded_cli
from experts.errors import ExpertsError
from experts.evaluation import cli as evaluation_cli
from service import cli_experts, cli_registry
from service.cli_settings import read_settings
from service.errors import TwinserveError
from service.keys import HASHED, Keys, digest_of, new_key, parse_key
from service.logs import configure_logging
from service.remote.console import URL_VARIABLE
from service.settings import ENV_PREFIX, Settings

if TYPE_CHECKING:
    from service.runtime import RuntimeSwitch

_log = logging.getLogger(__name__)


def build_app() -> typer.Typer:
    """All commands."""
    commands = typer.Typer(
        help="Serve a family of fine-tuned models from one shared expert, mixed per request.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands.command("serve")(serve)
    commands.command("native")(native)
    commands.command("key")(key)
    commands.add_typer(cli_registry.build_app(), name="registry")
    commands.add_typer(cli_experts.build_app(), name="experts")
    experts_cli.register(commands)
    commands.command("eval")(evaluation_cli.evaluate)
    commands.add_typer(embedded_cli.build_app(), name="embedded")
    return commands


def serve(
    bundle: Annotated[Path | None, typer.Option(help="Folder of the bundle to serve.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    experts_root: Annotated[
        Path | None, typer.Option(help="The only folder that experts register from.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda[:n].")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that generate together.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that wait beyond those.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option(help="One JSON object a log line.")] = None,
) -> None:
    """Serve a bundle over HTTP until SIGTERM, then drain.

    An option wins over its environment variable: TWINSERVE_ and the option's name in capitals, as
    TWINSERVE_PORT. Keys and limits have variables only: TWINSERVE_API_KEYS, TWINSERVE_ADMIN_KEY, …
    """
    settings = read_settings(
        bundle=bundle,
        host=host,
        port=port,
        experts_root=experts_root,
        device=device,
        dtype=dtype,
        threads=threads,
        max_batch=max_batch,
        max_queue=max_queue,
        log_level=log_level,
        log_json=log_json,
    )
    configure_logging(settings.log_level, settings.log_json)
    for name in unknown_variables(os.environ):
        _log.warning("the environment variable %s sets nothing; is it misspelt?", name)
    try:
        Keys(settings)  # before seconds of importing
        from service.serve import serve as run

        run(settings, lambda url, runtime: typer.echo(greeting(url, runtime, settings)))
    except (ExpertsError, TwinserveError, ValueError) as error:
        typer.echo(f"twinserve: {error}", err=True)
        raise typer.Exit(1) from error


def native(
    cache: Annotated[
        Path | None, typer.Option(help="Folder of libraries; the user's cache if not given.")
    ] = None,
    every_level: Annotated[
        bool, typer.Option("--all", help="For every processor level, as for an image that runs elsewhere.")
    ] = False,
) -> None:
    """Compile the decoder layers ahead of the first start, which would do it otherwise; needs g++."""
    from service.native import build

    try:
        for level in build.levels() if every_level else [build.this_level()]:
            typer.echo(f"{level}: {build.library(cache or build.default_cache(), level)}")
    except build.NativeUnavailableError as error:
        typer.echo(f"twinserve: {error}", err=True)
        raise typer.Exit(1) from error


def key(
    label: Annotated[str, typer.Option(help="Names the key in logs and metrics.")] = "",
) -> None:
    """Make a key: the first line is for its owner, the second one for a key file or TWINSERVE_API_KEYS."""
    made = new_key()
    line = f"{label} = " if label else ""
    line += f"{HASHED}{digest_of(made).hex()}"
    try:
        parse_key(line)
    except ValueError as error:
        typer.echo(f"twinserve: --label: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{made}\n{line}")


def unknown_variables(environment: os._Environ[str] | dict[str, str]) -> list[str]:
    """Variables with our prefix that no setting reads."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | {URL_VARIABLE}
    return sorted(
        name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    )


def greeting(url: str, runtime: "RuntimeSwitch", settings: Settings) -> str:
    """The URL, and one command to try."""
    body: dict[str, Any] = {"model": runtime.bundle_name, "max_tokens": 32}
    if runtime.tokenizer.chat_template:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Conjugate walk"}]
    else:
        path, body["prompt"] = "/v1/completions", "Hello, my name is"
    key = " -H 'Authorization: Bearer KEY'" if Keys(settings).inference else ""
    names = ", ".join(status.name for status in runtime.experts()) or "none"
    return (
        f"\ntwinserve is ready at {url} (experts: {names})\n\n"
        f"  curl {url}{path} -H 'Content-Type: application/json'{key} \\\n    -d '{json.dumps(body)}'\n"
    )


app = build_app()
