"""Raw connections: what is too long, too slow, or not read."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.harness import Served, eventually, serving
from tests.api.test_disconnect import idle
from tests.fixtures.tiny import TinyFamily

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": "alpha", "prompt": "a", "max_tokens": 1}).encode()
SECONDS = 0.5


@pytest.fixture(scope="module")
def impatient(family: TinyFamily) -> Iterator[Served]:
    with serving(
        family.bundle,
        header_seconds=SECONDS,
        body_seconds=SECONDS,
        stall_seconds=SECONDS,
        max_logprobs=20,
    ) as served:
        yield served


@contextlib.contextmanager
def connected(server: Served, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        yield connection


def heard(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def one_answer(connection: socket.socket) -> int:
    """The status of an answer whose body is shorter than a packet."""
    return int(connection.recv(65536).split()[1])


def sent_in_vain(connection: socket.socket, data: bytes) -> None:
    """A server that has refused already may close before it has taken everything."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"GET /v1/models?" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"GET /version HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431, "header_too_large"),
        (b"GET /version HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431, "header_too_large"),
        (b"GET /version HTTP/1.1\r\nX: " + b"y" * 1_000_000, 431, "header_too_large"),
        (b"GET /version HTTP/1.1\r\n" + b"a: b\r\n" * 200_000, 431, "header_too_large"),
        (b"GET /" + b"x" * 1_000_000, 431, "header_too_large"),
    ],
    ids=["url", "query", "field", "fields", "endless field", "endless fields", "endless url"],
)
def test_a_head_beyond_its_bounds_is_refused_by_name(
    impatient: Served, head: bytes, status: int, code: str
) -> None:
    with connected(impatient) as connection:
        sent_in_vain(connection, head)
        told, error = refusal(heard(connection))
    assert (told, error["code"]) == (status, code)
    assert "max_" in error["message"]
    assert impatient.http.get("/version").status_code == 200


def test_a_head_within_its_bounds_is_served(impatient: Served) -> None:
    fields = {f"x-{number}": "y" * 300 for number in range(80)}
    assert impatient.http.get("/version", headers=fields).status_code == 200
    assert impatient.http.get(f"/version?{'x' * 8000}").status_code == 200


@pytest.mark.parametrize(
    "request_line",
    [
        b"nonsense",
        b"GET",
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9",
        b"GET \xff HTTP/1.1",
    ],
)
def test_what_is_no_http_is_a_400_and_hurts_nobody(impatient: Served, request_line: bytes) -> None:
    with connected(impatient) as connection:
        sent_in_vain(connection, request_line + b"\r\nHost: x\r\n\r\n")
        assert heard(connection).startswith(b"HTTP/1.1 400")
    assert impatient.http.get("/version").status_code == 200


def test_a_head_that_trickles_in_is_given_up(impatient: Served) -> None:
    before = impatient.metric('twinserve_connections_refused_total{reason="slow_header"}')
    with connected(impatient) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n")
        status, error = refusal(heard(connection))
    assert (status, error["code"]) == (408, "request_timeout")
    assert impatient.metric('twinserve_connections_refused_total{reason="slow_header"}') == before + 1


def test_a_second_request_on_a_connection_has_its_own_clock(impatient: Served) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert one_answer(connection) == 200
        connection.sendall(b"GET /ver")
        status, error = refusal(heard(connection))
    assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    "announced", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]
)
def test_a_body_that_trickles_in_is_given_up_and_nothing_is_left(impatient: Served, announced: bytes) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEAD + announced)
        status, error = refusal(heard(connection))
    assert (status, error["code"]) == (408, "request_timeout")
    assert "body_seconds" in error["message"]
    assert idle(impatient)


def test_waiting_for_an_answer_is_not_waiting_for_a_body(impatient: Served) -> None:
    body = {"model": "alpha", "prompt": "a", "max_tokens": 240, "n": 16, "ignore_eos": True}
    answer = impatient.post("/v1/completions", body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 240 * 16


def test_a_refusal_before_the_end_of_a_body_does_not_keep_the_connection(family: TinyFamily) -> None:
    with serving(family.bundle, api_keys="a-key") as locked, connected(locked) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        assert heard(connection).startswith(b"HTTP/1.1 401")


def test_pipelined_requests_are_answered_in_order(impatient: Served) -> None:
    ask = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
    with connected(impatient) as connection:
        connection.sendall(ask + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = heard(connection)
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.index(b"text_completion") < answers.index(b'"version"')


def unread(connection: socket.socket, fields: bytes = b"", **body: Any) -> None:
    """Ask for more than all buffers hold, and read nothing of it."""
    asked = {"model": "alpha", "prompt": "a", "n": 16, "max_tokens": 240, "ignore_eos": True, "logprobs": 20}
    content = json.dumps({**asked, **body}).encode()
    connection.sendall(HEAD + fields + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_nothing_is_cut_off_and_everything_is_given_back(
    impatient: Served, stream: bool
) -> None:
    name = 'twinserve_connections_refused_total{reason="stalled"}'
    before = impatient.metric(name)
    with connected(impatient, receive_buffer=4096) as connection:
        unread(connection, stream=stream)
        assert eventually(lambda: impatient.metric(name) == before + 1, seconds=60)
        assert eventually(lambda: idle(impatient))
    assert impatient.complete(max_tokens=1)


def test_what_waits_for_a_slow_client_is_bounded(family: TinyFamily) -> None:
    with (
        serving(family.bundle, stream_backlog=16, stall_seconds=60) as served,
        connected(served, receive_buffer=4096) as connection,
    ):
        unread(connection, stream=True)
        # Its rows are free although nobody has read a word.
        aborted = 'twinserve_request_success_total{finished_reason="abort"}'
        assert eventually(lambda: served.metric(aborted) > 0, seconds=60)
        assert eventually(lambda: idle(served))
        answer = heard_stream(connection)
    last = json.loads(answer.rpartition(b"data: ")[2].partition(b"\n")[0])
    assert last["error"]["code"] == "client_too_slow"
    assert "stream_backlog" in last["error"]["message"]


def heard_stream(connection: socket.socket) -> bytes:
    """All of a chunked answer."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        part = connection.recv(65536)
        assert part, "the connection was closed in the middle"
        received += part
    return received
