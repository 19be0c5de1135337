"""A body that goes to the disk may take as long as it needs, if it comes at all."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.middleware import LimitBody
from service.errors import BodyTooLargeError, SlowRequestError

STREAMED = "/streamed"


def read(path: str, chunks: Iterator[tuple[float, bytes]], seconds: float, limit: int = 100) -> int:
    """What an app behind the limit reads of a body that comes in (seconds after the one before, bytes)."""
    seen = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal seen
        more = True
        while more:
            message = await receive()
            seen += len(message["body"])
            more = message["more_body"]

    async def receive() -> Message:
        for pause, chunk in chunks:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": chunk, "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    guarded = LimitBody(
        app,
        max_bytes=limit,
        seconds=seconds,
        streamed=lambda scope: scope["path"] == STREAMED,
        max_streamed_bytes=10_000_000,
    )
    scope: dict[str, Any] = {"type": "http", "path": path, "headers": [], "method": "PUT"}
    asyncio.run(guarded(scope, receive, send))
    return seen


def test_a_streamed_body_may_take_longer_and_be_larger_than_others() -> None:
    parts = [(0.1, b"x" * 100_000)] * 8
    assert read(STREAMED, iter(parts), seconds=0.4) == 800_000
    with pytest.raises(BodyTooLargeError, match="max_body_bytes"):
        read("/other", iter(parts), seconds=0.4)
    with pytest.raises(SlowRequestError, match="body_seconds"):
        read("/other", iter([(0.1, b"x")] * 8), seconds=0.4)


def test_a_streamed_body_that_drips_or_stands_still_is_ended() -> None:
    with pytest.raises(SlowRequestError, match="bytes/s"):
        read(STREAMED, iter([(0.1, b"x")] * 100), seconds=0.4)
    with pytest.raises(SlowRequestError, match="stood still"):
        read(STREAMED, iter([(0.0, b"x" * 1_000_000), (5.0, b"x")]), seconds=0.4)


def test_a_streamed_body_ends_at_its_own_limit() -> None:
    with pytest.raises(BodyTooLargeError, match="max_source_bytes"):
        read(STREAMED, iter([(0.0, b"x" * 2_000_000)] * 8), seconds=5)
