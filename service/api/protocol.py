"""Connections: uvicorn's HTTP protocol with bounds on what it keeps for a client and on how long it waits for one.

What is bounded: the request line and the header fields in bytes and number, the time that they take to arrive, and
the time in which a client may take nothing of its answer. Bodies are bounded where they are read, see `LimitBody`.
"""

import asyncio
import logging
import socket
from asyncio import TimerHandle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.errors import error_response
from service.errors import HeaderTooLargeError, SlowRequestError, TwinserveError, UrlTooLongError

_log = logging.getLogger(__name__)

_LINGER_SECONDS = 2.0
"""After an answer that came before the end of its request: time to read it before the connection is closed."""

_SEND_BUFFER = 256 * 1024
"""Bytes of an answer that the kernel holds for a client; left to itself it would take megabytes of each."""

_FIELD_OVERHEAD = 4  # ": " and the line's end


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The operator's bounds, see the settings of these names."""

    max_url_bytes: int
    max_header_bytes: int
    max_headers: int
    header_seconds: float
    stall_seconds: float


def guarded_protocol(
    limits: ConnectionLimits, dropped: Callable[[str], None] = lambda _: None
) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn.

    Args:
        limits: the bounds.
        dropped: told why a request was refused or a connection cut here.
    """

    class Guarded(GuardedProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.limits = limits
            self.dropped = dropped

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    """See the module; made by `guarded_protocol`."""

    limits: ConnectionLimits
    dropped: Callable[[str], None]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = False
        self._over = False
        self._fed = self._size = self._fields = 0
        self._deadline: TimerHandle | None = None
        self._stall: TimerHandle | None = None

    # -- the connection -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        plain = transport.get_extra_info("socket")
        if plain is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._set_deadline(self.timeout_keep_alive, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._set_deadline(None)
        self._set_stall(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless this connection is over; a header that does not end is refused."""
        if self._over:
            return
        was_in_head = self._in_head
        super().data_received(data)
        if not self._in_head:
            return
        if was_in_head:
            self._fed += len(data)
        if self._fed > self.limits.max_url_bytes + self.limits.max_header_bytes:
            self._refuse("header", self._too_large())

    def pause_writing(self) -> None:
        """The client does not keep up: its answer waits, but not for ever."""
        super().pause_writing()
        self._set_stall(self.limits.stall_seconds)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._set_stall(None)
        super().resume_writing()

    # -- one request --------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._fed = self._size = self._fields = 0
        self._set_deadline(self.limits.header_seconds, self._late)

    def on_url(self, url: bytes) -> None:
        """A part of the request line; what is beyond the bound is not kept."""
        if len(self.url) <= self.limits.max_url_bytes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field; what is beyond the bounds is not kept."""
        self._size += len(name) + len(value) + _FIELD_OVERHEAD
        self._fields += 1
        if self._size <= self.limits.max_header_bytes and self._fields <= self.limits.max_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Serve the request, or its refusal in its place."""
        self._in_head = False
        self._set_deadline(None)
        refusal = self._refusal()
        if refusal is None:
            super().on_headers_complete()
            return
        served, self.app = self.app, cast(Any, error_response(refusal, close=True))
        self.url = b"/"
        self.dropped("header")
        try:
            super().on_headers_complete()
        finally:
            self.app = served

    def on_response_complete(self) -> None:
        """An answer that did not wait for the end of its request leaves a connection of no further use."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._set_deadline(_LINGER_SECONDS, self.transport.abort)

    # -- ends ---------------------------------------------------------------------------------------

    def _refusal(self) -> TwinserveError | None:
        if len(self.url) > self.limits.max_url_bytes:
            return UrlTooLongError(
                f"The URL is longer than {self.limits.max_url_bytes} bytes (max_url_bytes); shorten it."
            )
        if self._size > self.limits.max_header_bytes or self._fields > self.limits.max_headers:
            return self._too_large()
        return None

    def _too_large(self) -> HeaderTooLargeError:
        return HeaderTooLargeError(
            f"The header fields exceed {self.limits.max_header_bytes} bytes (max_header_bytes) or "
            f"{self.limits.max_headers} fields (max_headers); send less."
        )

    def _late(self) -> None:
        self._refuse(
            "slow_header",
            SlowRequestError(
                f"The header did not arrive within {self.limits.header_seconds:g} s (header_seconds)."
            ),
        )

    def _refuse(self, why: str, error: TwinserveError) -> None:
        """Answer a request whose header never ended; then hear nothing more."""
        self._over = True
        self.dropped(why)
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # The answer before it is still under way.
            return
        answer = error_response(error, close=True)
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(answer.body))
        # Closing at once with input unread would reset the connection, and the answer be lost.
        self.transport.write_eof()
        self._set_deadline(_LINGER_SECONDS, self.transport.abort)

    def _cut(self) -> None:
        _log.info("a client took nothing of its answer for %g s: cut off", self.limits.stall_seconds)
        self.dropped("stalled")
        self.transport.abort()

    def _set_deadline(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None or then is None else self.loop.call_later(seconds, then)

    def _set_stall(self, seconds: float | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = None if seconds is None else self.loop.call_later(seconds, self._cut)
