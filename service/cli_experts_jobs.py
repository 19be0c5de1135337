"""`twinserve experts add|jobs|export|rebuild`: what takes a while and shows how far it is."""

import contextlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer

from service.remote import RefusedError, Server, UnreachableError, tables
from service.remote.archives import top_of, unpack
from service.remote.console import (
    DEFAULT_URL,
    FAILED,
    INTERRUPTED,
    AsJson,
    Key,
    Name,
    Url,
    complain,
    connected,
    job_bar,
    tell,
    transfer,
    usage,
)
from service.remote.jobs import ENDED, Job, cancel, follow
from service.remote.sources import SourceError, files_of
from service.remote.uploads import Remembered, send

_STOP_SECONDS = 10.0

_Detach = Annotated[bool, typer.Option("--detach", help="Begin the job and return at once.")]


def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|FILE|URL",
            help="A LoRA, whole model, ready expert or .gguf of this machine, or where the server finds it.",
            show_default=False,
        ),
    ],
    server_path: Annotated[
        bool, typer.Option("--server-path", help="The folder is the server's, below TWINSERVE_EXPERTS_ROOT.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank kept of each matrix.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Or the energy kept of each matrix.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="What it is for: a text a line, or JSON lines with a prompt.", show_default=False),
    ] = None,
    canaries: Annotated[
        Path | None,
        typer.Option(help="JSON lines of prompt, expected and match (exact, contains).", show_default=False),
    ] = None,
    min_score: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the canaries that must come out.")
    ] = 1.0,
    replace: Annotated[bool, typer.Option("--replace", help="Of an expert that exists.")] = False,
    expected: Annotated[
        int | None,
        typer.Option("--if", min=1, help="Replace this generation, and no other.", show_default=False),
    ] = None,
    activate: Annotated[bool, typer.Option(help="Serve it as soon as it is ready.")] = True,
    trial: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Only try it on this percent of requests.", show_default=False),
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="File of a detached signature.", show_default=False)
    ] = None,
    detach: _Detach = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Register an expert, or a new generation of one, and wait until it serves."""
    body: dict[str, Any] = {"name": name, "replace": replace, "activate": activate}
    optional = {
        "rank": rank,
        "energy": energy,
        "expected_generation": expected,
        "trial": None if trial is None else {"kind": "canary", "percent": trial},
    }
    body |= {field: value for field, value in optional.items() if value is not None}
    if rank is not None and energy is not None:
        raise usage("give --rank or --energy, not both")
    with _reading():
        if prompts is not None:
            body["prompts"] = read_prompts(prompts)
        if canaries is not None:
            lines = canaries.read_text(encoding="utf-8").splitlines()
            body["canary_prompts"] = [json.loads(line) for line in lines if line.strip()]
            body["canary_min_score"] = min_score
        if signature is not None:
            body["signature"] = signature.read_text(encoding="ascii").strip()
        files = {} if server_path or "://" in source else files_of(Path(source).expanduser())
    with connected(url, key, as_json) as server:
        if files:
            with transfer("uploading") as show:
                body["upload"] = send(server, files, Remembered.of_user(), show)
        else:
            body["path" if server_path else "url"] = source
        _finish(server, _begun(server, "/admin/experts", body), detach, as_json)


def jobs(
    job: Annotated[
        str | None, typer.Argument(help="Id of one job; none lists them.", show_default=False)
    ] = None,
    state: Annotated[
        Literal["queued", "running", "succeeded", "failed", "cancelled"] | None,
        typer.Option(help="Only those.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only those of this expert.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most of them.")] = 20,
    watch: Annotated[bool, typer.Option("--follow", help="Wait until it has ended.")] = False,
    stop: Annotated[bool, typer.Option("--cancel", help="Stop it.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Begin a failed one anew, and wait.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List jobs, or show, follow, cancel or retry one."""
    if sum((watch, stop, retry)) > 1 or (job is None and (watch or stop or retry)):
        raise usage("--follow, --cancel and --retry take one job, and only one of them")
    with connected(url, key, as_json) as server:
        if job is None:
            found = server.ask("GET", "/admin/jobs", query={"state": state, "name": name, "limit": limit})
            tell(found["data"]) if as_json else tables.jobs(found["data"])
            return
        path = f"/admin/jobs/{quote(job, safe='')}"
        if stop:
            one = server.ask("POST", f"{path}/cancel")
        elif retry:
            one = server.ask("POST", f"{path}/retry")
        else:
            one = server.ask("GET", path)
        if watch or retry:
            _finish(server, one, False, as_json)
        else:
            tell(one) if as_json else tables.job(one)


def export(
    name: Annotated[
        str | None, typer.Argument(help="The expert; none with --gates.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["peft", "gguf", "expert"],
        typer.Option("--format", help="A LoRA for PEFT or llama.cpp, or the files as they are served."),
    ] = "peft",
    generation: Annotated[
        int | None, typer.Option(min=1, help="The current one if not given.", show_default=False)
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(help='Instead: a whole model with "a:0.5,b:0.5" merged in.', show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; named after what is in it.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Write an expert, or a mix merged into a model, for other programs."""
    if (name is None) == (gates is None):
        raise usage("give an expert, or --gates for a whole model")
    if gates is not None and generation is not None:
        raise usage("--gates names generations itself: a@2:0.5")
    if out is not None and out.exists():
        raise usage(f"{out} is there already; give a folder that is not")
    if name is not None:
        path = f"/admin/experts/{quote(name, safe='')}/export"
        query: dict[str, Any] = {"format": form, "generation": generation}
    else:
        path, query = "/admin/export", {"format": "model", "gates": gates}
    with (
        connected(url, key, as_json) as server,
        server.stream(path, query=query) as answer,
        transfer("exporting") as show,
    ):
        target = out or Path(top_of(answer))
        if out is None and target.exists():
            raise usage(f"{target} is there already; give --out")
        total = int(answer.headers.get("content-length", 0)) or None
        names = unpack(answer, target, lambda done: show(done, total))
    if as_json:
        tell({"folder": str(target), "files": names})
    else:
        typer.echo(f"{target}: {', '.join(names)}")


def rebuild(
    merge: Annotated[
        list[str] | None,
        typer.Option(help="method=NAME and its parameters, once for each.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder of the base, below the server's root.", show_default=False)
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="Or a bundle that is built already, below it.", show_default=False)
    ] = None,
    detach: _Detach = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Build a new shared expert over all current experts and switch to it, without dropping a request."""
    body: dict[str, Any] = {}
    if merge:
        body["merge"] = read_parameters(merge)
    body |= {field: value for field, value in {"base": base, "path": path}.items() if value is not None}
    with connected(url, key, as_json) as server:
        _finish(server, _begun(server, "/admin/bundles", body), detach, as_json)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: JSON lines that are texts or have a "prompt", or plain lines.

    Raises:
        ValueError: a line of JSON lines is neither.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    read = [json.loads(line) for line in lines]
    found = [line.get("prompt") if isinstance(line, dict) else line for line in read]
    for number, prompt in enumerate(found, start=1):
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: line {number} is neither a text nor has a prompt")
    return [str(prompt) for prompt in found]


def read_parameters(pairs: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE; values that are JSON are what they say, others are texts."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise usage(f"--merge {pair!r} is not NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _begun(server: Server, path: str, body: Mapping[str, Any]) -> Job:
    """The job that a request begins; its own key lets one be sent again whose answer was lost."""
    headers = {"Idempotency-Key": secrets.token_hex(16)}
    return dict(server.ask("POST", path, body, headers=headers, again=True))


def _finish(server: Server, job: Job, detach: bool, as_json: bool) -> None:
    """Wait for a job, unless it is left alone, and tell what came of it."""
    if not detach:
        job = _watched(server, job)
    if as_json:
        tell(job)
    elif job["state"] == "succeeded" and job["name"]:
        with contextlib.suppress(RefusedError):  # retired meanwhile
            tables.expert(server.ask("GET", f"/admin/experts/{quote(job['name'], safe='')}"))
    elif job["state"] == "failed":
        complain(job["error"]["message"] if job["error"] else "the job failed")
        typer.echo(f"job {job['id']}; twinserve experts jobs {job['id']} --retry tries again", err=True)
    else:
        tables.job(job)
    if not detach and job["state"] != "succeeded":
        raise typer.Exit(FAILED)


def _watched(server: Server, job: Job) -> Job:
    """The job as it ended. Ctrl-C asks the server to cancel it, and waits a little for that."""
    with job_bar() as show:
        try:
            return follow(server, job, show)
        except KeyboardInterrupt:
            try:
                cancel(server, job)
                ended = follow(server, {**job, "cancelling": True}, show, _STOP_SECONDS)
            except (KeyboardInterrupt, UnreachableError):
                complain(f"job {job['id']} may still run; twinserve experts jobs {job['id']} tells")
                raise typer.Exit(INTERRUPTED) from None
    if ended["state"] in ENDED and ended["state"] != "succeeded":
        complain(f"job {job['id']}: {ended['state']}")
        raise typer.Exit(INTERRUPTED)
    return ended


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read here is a usage error."""
    try:
        yield
    except (OSError, ValueError, SourceError) as error:
        raise usage(str(error)) from error
