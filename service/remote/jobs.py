"""Following a job through its server-sent events, over lost connections, until it has ended."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from service.remote.server import RefusedError, Server, UnreachableError

ENDED = frozenset({"succeeded", "failed", "cancelled"})

_GIVE_UP_SECONDS = 60.0
_PAUSE_SECONDS = 0.5
_PATIENCE_SECONDS = 60.0
"""Of silence; servers say something every quarter of a minute, unless told otherwise."""

Job = dict[str, Any]


def follow(server: Server, job: Job, show: Callable[[Job], None], give_up: float = _GIVE_UP_SECONDS) -> Job:
    """The job as it ended; `show` gets it whenever it has changed.

    Raises:
        RefusedError: the server knows no such job.
        UnreachableError: nothing was heard for `give_up` seconds.
    """
    show(job)
    last, heard = "", time.monotonic()
    while job["state"] not in ENDED:
        try:
            for identity, data in _events(server, f"/admin/jobs/{job['id']}/events", last):
                last, heard = identity, time.monotonic()
                job = data
                show(job)
        except UnreachableError:
            if time.monotonic() - heard > give_up:
                raise
        except RefusedError as error:
            if error.status < 500 or time.monotonic() - heard > give_up:
                raise
        if job["state"] not in ENDED:
            time.sleep(_PAUSE_SECONDS)
    return job


def cancel(server: Server, job: Job) -> None:
    """Ask the server to stop a job; one that has ended meanwhile is left as it is."""
    try:
        server.ask("POST", f"/admin/jobs/{job['id']}/cancel", again=True)
    except RefusedError as error:
        if error.code != "wrong_state":
            raise


def _events(server: Server, path: str, last: str) -> Iterator[tuple[str, Job]]:
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
    with server.stream(path, headers=headers, patience=_PATIENCE_SECONDS) as answer:
        yield from read_events(answer.iter_lines())


def read_events(lines: Iterable[str]) -> Iterator[tuple[str, Job]]:
    """Id and JSON object of each event; comments and what is no object are passed over."""
    identity, data = "", []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            identity = value
        elif name == "data":
            data.append(value)
        elif not line and data:
            try:
                found = json.loads("\n".join(data))
            except ValueError:
                found = None
            if isinstance(found, dict) and "state" in found:
                yield identity, found
            data = []
