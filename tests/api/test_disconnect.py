"""A client that hangs up frees what its request held."""

import asyncio
import socket
from typing import Any

import httpx
import pytest

from tests.api.harness import Served, eventually

ABORTED = 'twinserve_request_success_total{finished_reason="abort"}'
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Add 1 and 2.",
    "n": 16,
    "max_tokens": 200,
    "ignore_eos": True,
}


def idle(server: Served) -> bool:
    gauges = server.runtime.gauges()
    leases = sum(status.leases for status in server.runtime.experts())
    return gauges.running == gauges.waiting == gauges.kv_blocks_used == leases == 0


def test_hanging_up_on_a_stream_ends_its_sequences(server: Served) -> None:
    before = server.metric(ABORTED)
    with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: idle(server))
    assert server.metric(ABORTED) == before + 16


def test_hanging_up_on_a_plain_request_ends_its_sequences(server: Served) -> None:
    before = server.metric(ABORTED)

    async def give_up() -> None:
        async with httpx.AsyncClient(base_url=server.url) as client:
            await client.post("/v1/completions", json=BODY, timeout=httpx.Timeout(10, read=0.05))

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(give_up())
    assert eventually(lambda: idle(server))
    assert server.metric(ABORTED) == before + 16


def test_hanging_up_while_the_body_is_sent_starts_nothing(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model": "tiny",'
        )
    assert eventually(lambda: idle(server))
    assert server.complete(max_tokens=1)


def test_the_others_go_on(server: Served) -> None:
    lasting = {
        "model": "beta",
        "prompt": "Add 1 and 2.",
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
    }
    alone = server.complete(**lasting)["choices"][0]["text"]
    with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
        next(answer.iter_lines())
        chunks = []
        with server.http.stream("POST", "/v1/completions", json={**lasting, "stream": True}) as other:
            lines = other.iter_lines()
            chunks.append(next(lines))
            answer.close()
            chunks += list(lines)
    assert chunks[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in chunks
    assert server.complete(**lasting)["choices"][0]["text"] == alone
