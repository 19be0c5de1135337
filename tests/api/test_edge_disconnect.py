"""How soon a vanished client's place is free again, counted in the engine's own steps."""

import json
import socket
import threading
from typing import Any

import pytest

from service.core import RequestStats, StepStats
from service.runtime.thread import StatsSink
from tests.api.harness import Served, eventually, serving
from tests.api.test_disconnect import idle
from tests.fixtures.tiny import TinyFamily

ENDED = 'twinserve_http_requests_total{method="POST",route="/v1/completions"'
LONG: dict[str, Any] = {"model": "alpha", "prompt": "a", "max_tokens": 240, "ignore_eos": True}


class Watched:
    """The engine's statistics on their way; holds the engine after each step, once told to, until it may go on."""

    def __init__(self, sink: StatsSink) -> None:
        self._sink = sink
        self.hold = False
        self.steps = 0
        self.ended: list[str] = []
        self.may_step = threading.Semaphore(0)

    def on_step(self, stats: StepStats) -> None:
        self._sink.on_step(stats)
        self.steps += 1
        if self.hold:
            assert self.may_step.acquire(timeout=30)

    def on_request(self, stats: RequestStats) -> None:
        self._sink.on_request(stats)
        self.ended.append(stats.reason)


@pytest.mark.parametrize("abrupt", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_clients_row_is_free_within_two_steps(
    family: TinyFamily, abrupt: bool, stream: bool
) -> None:
    with serving(family.bundle) as served:
        watched = watch(served)
        connection = ask(served, stream)
        assert eventually(lambda: watched.steps > 3)
        watched.hold = True
        if abrupt:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
        # The engine stands still until the server has noticed; only then do steps count.
        assert eventually(lambda: ENDED in served.http.get("/metrics").text)
        seen = watched.steps
        watched.may_step.release(2)
        assert eventually(lambda: watched.ended == ["cancelled"])
        assert watched.steps <= seen + 2
        assert eventually(lambda: idle(served))
        watched.hold = False
        watched.may_step.release(1000)


def watch(served: Served) -> Watched:
    thread = served.runtime.runtime._thread
    assert thread._stats is not None
    watched = Watched(thread._stats)
    thread._stats = watched
    return watched


def ask(served: Served, stream: bool) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    body = json.dumps({**LONG, "stream": stream}).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    if stream:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    return connection
