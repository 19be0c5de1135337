"""Server-sent events: a response that notices a client that hung up, and says something when it is silent."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import error_body, internal_error
from service.errors import TwinserveError

_log = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """Sends each of `chunks` as one event, then `done`; an error on the way is the last event instead.

    Args:
        chunks: JSON texts without newlines.
        close: called once at the end, however it came.
        keepalive: seconds of silence after which a comment is sent.
        done: what a stream that ended well ends with.
        failure: the JSON object of an error.
        framed: `chunks` are whole events, names and blank lines included.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None],
        keepalive: float,
        *,
        done: bytes = _DONE,
        failure: Callable[[TwinserveError], Mapping[str, Any]] = error_body,
        framed: bool = False,
    ) -> None:
        super().__init__(headers=_HEADERS)
        self._done = done
        self._failure = failure
        self._framed = framed
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close
        self._keepalive = keepalive
        self._open = True
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the chunks end or the client hangs up."""
        work = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnect(receive))
        beat = asyncio.create_task(self._beat(send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open = False
            for task in (work, gone, beat):
                task.cancel()
            results = await asyncio.gather(work, gone, beat, return_exceptions=True)
            self._close()
        if isinstance(results[0], Exception):
            raise results[0]

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await self._send(send, chunk if self._framed else b"data: " + chunk + b"\n\n")
            last = self._done
        except TwinserveError as error:
            last = self._failed(error)
        except Exception:  # noqa: BLE001 the status line is out; only an event can still say so
            _log.exception("stream failed")
            last = self._failed(internal_error())
        self._open = False
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _failed(self, error: TwinserveError) -> bytes:
        return b"data: " + json.dumps(self._failure(error)).encode() + b"\n\n"

    async def _send(self, send: Send, body: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": True}
        await send(message)
        self._last = asyncio.get_running_loop().time()

    async def _beat(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._last = clock()
        while True:
            await asyncio.sleep(self._last + self._keepalive - clock())
            if self._open and clock() - self._last >= self._keepalive:
                await self._send(send, _KEEPALIVE)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
