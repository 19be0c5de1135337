"""Settings of a command: environment and options; what is wrong is told in the operator's words."""

from typing import Any

import typer
from pydantic import ValidationError

from service.settings import ENV_PREFIX, Settings


def read_settings(**options: Any) -> Settings:
    """The environment's settings, with options that are not None put over them.

    Raises:
        typer.Exit: one is wrong; the reason was printed.
    """
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            variable = f"{ENV_PREFIX}{name.upper()}: " if name else ""
            typer.echo(f"twinserve: {variable}{problem['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from error
