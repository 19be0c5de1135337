"""`twinserve registry keygen|sign`: keys that vouch for experts, and signatures made with them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from experts.errors import ExpertsError

_SIGNATURE_MODE = 0o644
_KEY_MODE = 0o600


def keygen(
    out: Annotated[Path, typer.Argument(help="File of the private key; must not exist.")],
    label: Annotated[str | None, typer.Option(help="Whose key it is, for the list of trusted keys.")] = None,
) -> None:
    """Make a private key, and print the line that lets a server trust it (TWINSERVE_SIGNATURE_KEYS)."""
    from experts.registry.sources import new_keys

    private, public = new_keys()
    try:
        _write_new(out, private, _KEY_MODE)
    except FileExistsError as error:
        raise _refused(f"{out} exists; keys are not overwritten, choose another file") from error
    except OSError as error:
        raise _refused(f"{out} cannot be written: {error.strerror}") from error
    typer.echo(f"{label} = {public}" if label else public)


def sign(
    source: Annotated[Path, typer.Argument(help="Folder of the fine-tune or expert.")],
    key: Annotated[Path, typer.Option(help="File of the private key.")],
    detached: Annotated[
        bool, typer.Option("--detached", help="Write no twinserve.sig into the folder.")
    ] = False,
) -> None:
    """Sign the files that an expert would be made of: prints the signature and puts it beside them."""
    from experts.registry.sources import SIGNATURE_NAME, digest_of_source
    from experts.registry.sources import sign as signed

    try:
        signature = signed(key.read_text(encoding="utf-8"), digest_of_source(source))
        if not detached:
            (source / SIGNATURE_NAME).unlink(missing_ok=True)
            _write_new(source / SIGNATURE_NAME, f"{signature}\n", _SIGNATURE_MODE)
    except (ExpertsError, OSError, UnicodeDecodeError) as error:
        raise _refused(str(error)) from error
    typer.echo(signature)


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that must not exist, nobody else reading it in between."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _refused(message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(1)
