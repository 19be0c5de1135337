"""`twinserve experts …`: the experts of a running server, from anywhere that reaches it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer

from service import cli_experts_bundles as bundles
from service import cli_experts_jobs as jobs
from service.remote import Server, tables
from service.remote.console import DEFAULT_URL, AsJson, Expected, Key, Name, Url, connected, tell, usage

_Generation = Annotated[int, typer.Argument(min=1, help="Number of the generation.", show_default=False)]


def build_app() -> typer.Typer:
    """All commands."""
    commands = typer.Typer(
        help="Manage the experts of a running server. Exit codes: 0 done, 1 refused or failed, 2 called wrongly.",
        no_args_is_help=True,
        add_completion=False,
    )
    commands.command("list")(list_experts)
    commands.command("show")(show)
    commands.command("add")(jobs.add)
    commands.command("rollback")(rollback)
    commands.command("activate")(activate)
    commands.command("pin")(pin)
    commands.command("disable")(disable)
    commands.command("enable")(enable)
    commands.command("retire")(retire)
    commands.command("alias")(alias)
    commands.command("trial")(trial)
    commands.command("jobs")(jobs.jobs)
    commands.command("export")(jobs.export)
    commands.command("rebuild")(jobs.rebuild)
    commands.command("bundles")(bundles.bundles)
    commands.command("return")(bundles.return_to)
    return commands


def list_experts(
    state: Annotated[
        Literal["active", "disabled", "retired"] | None,
        typer.Option(help="Only those; without it all but retired ones.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List the experts."""
    with connected(url, key, as_json) as server:
        rows: list[dict[str, Any]] = []
        more = True
        while more:
            after = rows[-1]["name"] if rows else None
            page = server.ask("GET", "/admin/experts", query={"state": state, "after": after})
            rows += page["data"]
            more = page["has_more"] and bool(page["data"])
        if as_json:
            tell(rows)
        else:
            tables.experts(rows)


def show(name: Name, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show one expert, its aliases and its newest generations."""
    with connected(url, key, as_json) as server:
        answer = server.ask("GET", path_of(name))
        if as_json:
            tell(answer)
        else:
            tables.expert(answer)


def rollback(
    name: Name,
    generation: Annotated[
        int | None, typer.Option(min=1, help="Back to this one; else to the one before.", show_default=False)
    ] = None,
    expected: Expected = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Serve an older generation again, at once."""
    body = {} if generation is None else {"generation": generation}
    with connected(url, key, as_json) as server:
        _change(server, "POST", f"{path_of(name)}/rollback", body, expected, as_json)


def activate(
    name: Name,
    generation: _Generation,
    expected: Expected = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Serve a ready generation, at once."""
    with connected(url, key, as_json) as server:
        _change(server, "POST", f"{path_of(name)}/activate", {"generation": generation}, expected, as_json)


def pin(
    name: Name,
    generation: Annotated[
        int | None, typer.Option(min=1, help="Switch to this one first.", show_default=False)
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Let registrations replace it again.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Keep the current generation, whatever is registered later."""
    if off and generation is not None:
        raise usage("--off takes no --generation")
    body = {} if generation is None else {"generation": generation}
    with connected(url, key, as_json) as server:
        _change(
            server, "DELETE" if off else "POST", f"{path_of(name)}/pin", None if off else body, None, as_json
        )


def disable(
    name: Name, expected: Expected = None, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = ""
) -> None:
    """Take an expert out of service and keep its name and generations."""
    with connected(url, key, as_json) as server:
        _change(server, "POST", f"{path_of(name)}/disable", None, expected, as_json)


def enable(
    name: Name, expected: Expected = None, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = ""
) -> None:
    """Serve a disabled expert again."""
    with connected(url, key, as_json) as server:
        _change(server, "POST", f"{path_of(name)}/enable", None, expected, as_json)


def retire(
    name: Name, expected: Expected = None, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = ""
) -> None:
    """Serve an expert no more; running requests keep it until they end."""
    with connected(url, key, as_json) as server:
        _change(server, "DELETE", path_of(name), None, expected, as_json)


def alias(
    alias: Annotated[
        str | None, typer.Argument(help="The other name; none lists all.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="The expert that it stands for.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away; the expert stays.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List aliases, show one, set one (ALIAS NAME) or remove one."""
    if remove and (alias is None or name is not None):
        raise usage("--remove takes one alias and no expert")
    with connected(url, key, as_json) as server:
        if alias is None:
            answer = server.ask("GET", "/admin/aliases")["data"]
        elif remove:
            answer = server.ask("DELETE", f"/admin/aliases/{quote(alias, safe='')}")
        elif name is None:
            answer = server.ask("GET", f"/admin/aliases/{quote(alias, safe='')}")
        else:
            answer = server.ask("PUT", f"/admin/aliases/{quote(alias, safe='')}", {"expert": name})
        if as_json:
            tell(answer)
        elif remove:
            typer.echo(f"{alias}: removed")
        else:
            tables.aliases(answer if isinstance(answer, list) else [answer])


def trial(
    name: Name,
    generation: Annotated[
        int | None, typer.Argument(min=1, help="A ready generation.", show_default=False)
    ] = None,
    percent: Annotated[float, typer.Option(min=0, max=100, help="Share of routed requests.")] = 5.0,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only compare its router's gates; it answers nobody.")
    ] = False,
    end: Annotated[bool, typer.Option("--end", help="End the trial.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Try a generation out beside the one that serves, or end a trial."""
    if end == (generation is not None):
        raise usage("give a generation to try out, or --end")
    body = {"generation": generation, "kind": "shadow" if shadow else "canary", "percent": percent}
    with connected(url, key, as_json) as server:
        _change(
            server, "DELETE" if end else "PUT", f"{path_of(name)}/trial", None if end else body, None, as_json
        )


def path_of(name: str) -> str:
    """An expert's address."""
    return f"/admin/experts/{quote(name, safe='')}"


def _change(
    server: Server,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    expected: int | None,
    as_json: bool,
) -> None:
    headers = {} if expected is None else {"If-Match": f'"{expected}"'}
    answer = server.ask(method, path, body, headers=headers)
    if as_json:
        tell(answer)
    else:
        tables.experts([answer])
