"""`twinserve experts bundles|return`: the shared experts that served, and the way back to one."""

from typing import Annotated
from urllib.parse import quote

import typer

from service.remote import tables
from service.remote.console import DEFAULT_URL, FAILED, AsJson, Key, Url, complain, connected, tell


def bundles(as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """List the bundle that serves and those that did, first the one that was replaced last."""
    with connected(url, key, as_json) as server:
        rows = server.ask("GET", "/admin/bundles")["data"]
    if as_json:
        tell(rows)
    else:
        tables.bundles(rows)


def return_to(
    build: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUILD]",
            help="Build id of the bundle; else the one that was replaced last.",
            show_default=False,
        ),
    ] = None,
    retire_absent: Annotated[
        bool, typer.Option("--retire-absent", help="Retire the experts that came after it.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Serve the bundle before a rebuild again, with the generations that served with it."""
    with connected(url, key, as_json) as server:
        if build is None:
            found = [row for row in server.ask("GET", "/admin/bundles")["data"] if row["returnable"]]
            if not found:
                complain("there is no bundle to go back to")
                raise typer.Exit(FAILED)
            build = str(found[0]["build_id"])
        body = {"absent": "retire" if retire_absent else "refuse"}
        answer = server.ask("POST", f"/admin/bundles/{quote(build, safe='')}/activate", body)
    if as_json:
        tell(answer)
    else:
        tables.bundles([answer])
