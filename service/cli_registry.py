"""`twinserve registry …`: check, clean and read the registry of the settings, with or without servers beside.

Works on the catalogue and the blob store themselves: TWINSERVE_BUNDLE, TWINSERVE_STATE_DIR, TWINSERVE_CATALOGUE,
TWINSERVE_BLOBS and TWINSERVE_BLOB_OPTIONS say where they are, as for `twinserve serve`.
"""

import contextlib
import getpass
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts.errors import ExpertsError
from service import cli_signing
from service.cli_settings import read_settings
from service.settings import Settings

if TYPE_CHECKING:
    from experts.registry.blobs import Blobs
    from experts.registry.catalogue import Catalogue
    from experts.registry.records import Actor, AuditEntry
    from experts.registry.verify import Findings

_BUNDLE = Annotated[Path | None, typer.Option(help="Folder of the bundle that is served.")]
_STATE = Annotated[Path | None, typer.Option(help="Folder of the registry, where it is not in the bundle's.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_GRACE = Annotated[
    float, typer.Option("--grace", min=0, help="Seconds since it was stored for which a blob is spared.")
]


def build_app() -> typer.Typer:
    """All commands."""
    commands = typer.Typer(
        help="Check, clean and read the registry of experts.", no_args_is_help=True, add_completion=False
    )
    commands.command("verify")(verify)
    commands.command("gc")(gc)
    commands.command("audit")(audit)
    commands.command("keygen")(cli_signing.keygen)
    commands.command("sign")(cli_signing.sign)
    return commands


def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    shallow: Annotated[bool, typer.Option("--shallow", help="Compare sizes only; read no blob.")] = False,
    grace: _GRACE = 0.0,
    as_json: _JSON = False,
    bundle: _BUNDLE = None,
    state_dir: _STATE = None,
) -> None:
    """Check that catalogue and blobs agree; exit code 1 if something is wrong and was not mended."""
    from experts.registry.verify import verify as check

    settings = read_settings(bundle=bundle, state_dir=state_dir)
    with _opened(settings, write=repair) as (catalogue, blobs):
        found = check(
            catalogue,
            blobs,
            repair=repair,
            deep=not shallow,
            actor=_operator(),
            folders=(settings.bundle,),
            grace_seconds=grace,
            attempts=settings.registration_attempts,
            jobs=settings.max_registrations,
        )
    _tell(found, as_json)
    if not found.clean:
        raise typer.Exit(1)


def gc(
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Newest generations of an expert to keep; else TWINSERVE_KEEP_GENERATIONS."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    grace: _GRACE = 0.0,
    as_json: _JSON = False,
    bundle: _BUNDLE = None,
    state_dir: _STATE = None,
) -> None:
    """Give up old generations, and delete blobs that nothing needs. Servers may run meanwhile."""
    from experts.registry.verify import collect_garbage

    settings = read_settings(bundle=bundle, state_dir=state_dir, keep_generations=keep)
    with _opened(settings, write=not dry_run) as (catalogue, blobs):
        gone = collect_garbage(
            catalogue, blobs, settings.keep_generations, _operator(), grace_seconds=grace, dry_run=dry_run
        )
    if as_json:
        _print({"generations": list(gone.generations), "blobs": gone.blobs, "bytes": gone.nbytes})
        return
    for name in gone.generations:
        typer.echo(f"generation {name}")
    typer.echo(f"{gone.blobs} blobs, {gone.nbytes / 2**20:.1f} MiB{', were they deleted' if dry_run else ''}")


def audit(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Entries, the newest first.")] = 50,
    target: Annotated[str | None, typer.Option(help="Only of this expert, alias, bundle or job.")] = None,
    before: Annotated[int | None, typer.Option(min=1, help="Only entries with smaller numbers.")] = None,
    as_json: _JSON = False,
    bundle: _BUNDLE = None,
    state_dir: _STATE = None,
) -> None:
    """Print who changed what, when, from where, and with what result; refused changes too."""
    settings = read_settings(bundle=bundle, state_dir=state_dir)
    with _catalogue(settings, write=False) as catalogue:
        entries = catalogue.audit(limit=limit, before=before, target=target)
    for entry in entries:
        if as_json:
            _print({**asdict(entry), "at": entry.at.isoformat()})
        else:
            typer.echo(_line(entry))


def _line(entry: "AuditEntry") -> str:
    who = entry.actor.name + (f" from {entry.actor.address}" if entry.actor.address else "")
    detail = f"  {json.dumps(entry.detail, ensure_ascii=False)}" if entry.detail else ""
    at = entry.at.isoformat(timespec="seconds")
    return f"{entry.id:>6}  {at}  r{entry.revision}  {who}: {entry.action} {entry.target}: {entry.result}{detail}"


def _tell(found: "Findings", as_json: bool) -> None:
    if as_json:
        _print({**asdict(found), "clean": found.clean})
        return
    for finding in found.found:
        done = f"; mended: {finding.mended}" if finding.mended is not None else ""
        typer.echo(f"{finding.kind}  {finding.subject}: {finding.problem}{done}")
    left = sum(finding.mended is None for finding in found.found)
    typer.echo(
        f"revision {found.revision}, {found.blobs} blobs of {found.nbytes / 2**20:.1f} MiB: "
        + (f"{left} of {len(found.found)} findings are left" if left else "everything agrees")
    )


def _print(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _operator() -> "Actor":
    """Whoever runs the command."""
    from experts.registry.records import Actor

    try:
        return Actor(f"command line ({getpass.getuser()})")
    except (KeyError, OSError):
        return Actor("command line")


@contextlib.contextmanager
def _opened(settings: Settings, *, write: bool) -> "Iterator[tuple[Catalogue, Blobs]]":
    """Catalogue and blobs of the settings; errors are printed and end the command with exit code 2."""
    from service.registrar.opening import open_blobs

    with _catalogue(settings, write=write) as catalogue:
        blobs = open_blobs(settings)
        try:
            yield catalogue, blobs
        finally:
            blobs.close()


@contextlib.contextmanager
def _catalogue(settings: Settings, *, write: bool) -> "Iterator[Catalogue]":
    from experts.registry.catalogue import Catalogue
    from service.registrar.opening import catalogue_url, state_folder

    try:
        if settings.catalogue is None and not state_folder(settings).is_dir():
            raise ValueError(
                f"there is no registry in {state_folder(settings)}; name the served bundle with --bundle, or "
                "set TWINSERVE_CATALOGUE and TWINSERVE_BLOBS as the servers have them"
            )
        catalogue = Catalogue.open(catalogue_url(settings), read_only=not write)
        try:
            yield catalogue
        finally:
            catalogue.close()
    except (ExpertsError, ValueError) as error:
        typer.echo(f"twinserve: {error}", err=True)
        raise typer.Exit(2) from error
