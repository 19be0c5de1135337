"""Pure ASGI layers around every route, outermost first: observe, authenticate, drain, bound the body.

`LimitCallers`, between the last two, is in `limits.py`.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import METRICS_PATH, OPEN_PATHS, Gatekeeper
from service.api.errors import error_response, internal_error
from service.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    ShuttingDownError,
    SlowRequestError,
    TwinserveError,
)
from service.metrics import Metrics
from service.record import RequestRecord, current, enter

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from service.telemetry.tracing import Tracing

_log = logging.getLogger("service.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SLOWEST = 16 * 1024
"""Bytes a second: a client that streams for hours is welcome, one that only holds a connection is not."""

_FORM_BYTES = 2**20
"""What the headers of a form's parts may take beside the files."""

_QUIET = OPEN_PATHS | {METRICS_PATH}
"""What is asked all the time and tells nothing new: neither logged nor traced."""

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
    "/": "text_completion",
    "/generate": "text_completion",
    "/generate_stream": "text_completion",
    "/completion": "text_completion",
    "/completions": "text_completion",
}
"""OpenTelemetry's words for what generates."""


class Observe:
    """Gives each request an id, a log line, a count and a span; turns an unexpected exception into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: "Tracing | None" = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, headers = 0, Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = RequestRecord(
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
            time.monotonic(),
            operation=_OPERATIONS.get(scope["path"], ""),
        )
        enter(record)
        scope.setdefault("state", {}).update(request_id=record.request_id, arrived=record.arrived)
        span = None
        if self._tracing is not None and scope["path"] not in _QUIET:
            span = self._tracing.begin(record, _method(scope), scope["path"], headers)

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            # The outermost net: whatever it is, the client gets an answer and the log the trace.
            _log.exception("request failed")
            if status == 0:
                await error_response(internal_error())(scope, receive, observed)
            else:
                raise
        finally:
            self._end(scope, record, status, span)

    def _end(self, scope: Scope, record: RequestRecord, status: int, span: "Span | None") -> None:
        seconds = time.monotonic() - record.arrived
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.on_http(_method(scope), route, status, seconds, record.key)
        if self._tracing is not None and span is not None:
            self._tracing.end(span, record, _method(scope), route, status)
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        fields = _access_fields(record, status, seconds)
        _log.log(level, "%s %s", scope["method"], scope["path"], extra={"fields": fields})


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "OTHER"


def _access_fields(record: RequestRecord, status: int, seconds: float) -> dict[str, Any]:
    """One request in one line; what is not known of it is left out."""
    first = record.first_token
    fields = {
        "request_id": record.request_id,
        "status": status,
        "seconds": round(seconds, 4),
        "key": record.key,
        "model": record.model,
        "sequences": record.sequences,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens if record.sequences else 0,
        "first_token_seconds": None if first is None else round(first - record.arrived, 4),
        "finish_reasons": ",".join(sorted(set(record.reasons))),
        "pattern": " ".join(record.patterns),
    }
    return {name: value for name, value in fields.items() if value or name == "status"}


class Authenticate:
    """Asks the gatekeeper before anything of the request is read; what it does not know is closed."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self._app = app
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http":
            try:
                caller = self._gatekeeper.check(scope["path"], Headers(scope=scope), scope["method"])
            except TwinserveError as error:
                await error_response(error)(scope, receive, send)
                return
            record = current()
            if record is not None:
                record.key = caller.id
            scope.setdefault("state", {}).update(caller=caller, client=caller.id)
        await self._app(scope, receive, send)


class RefuseWhileDraining:
    """Sends new work elsewhere once the shutdown has begun, and with each answer lets go of a connection."""

    def __init__(self, app: ASGIApp, draining: Callable[[], bool]) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def parting(message: Message) -> None:
            if message["type"] == "http.response.start" and self._draining():
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if self._draining() and scope["path"] not in _QUIET:
            error = ShuttingDownError("The server is shutting down; send the request again.", retry_after=5)
            await error_response(error)(scope, receive, parting)
            return
        await self._app(scope, receive, parting)


class LimitBody:
    """Stops reading a body at the limit of size or of time, however its length was announced.

    Args:
        max_bytes: of a body.
        seconds: for all of it to arrive.
        streamed: tells requests whose bodies go to the disk as they come; they have limits of their own.
        max_streamed_bytes: of such a body. Nothing of it may take longer than `seconds` to come, nor may all of it
            come more slowly than any client does.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        seconds: float,
        streamed: Callable[[Scope], bool] = lambda _: False,
        max_streamed_bytes: int = 0,
    ) -> None:
        self._app = app
        self._whole = _Bounds(max_bytes, "max_body_bytes", seconds)
        self._streams = _Bounds(max_streamed_bytes + _FORM_BYTES, "max_source_bytes", seconds, streamed=True)
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        bounds = self._streams if self._streamed(scope) else self._whole
        announced = Headers(scope=scope).get("content-length")
        if announced is not None:
            refusal = bounds.refusal(announced)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        seen, more = 0, True
        clock = asyncio.get_running_loop().time
        begun = clock()

        async def counted() -> Message:
            nonlocal seen, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(bounds.deadline(begun, seen, clock())):
                    message = await receive()
            except TimeoutError:
                raise bounds.too_slow() from None
            if message["type"] == "http.request":
                more = message.get("more_body", False)
                seen += len(message.get("body", b""))
                if seen > bounds.nbytes:
                    raise bounds.too_large()
            return message

        await self._app(scope, counted, send)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What one kind of bodies may take.

    Attributes:
        setting: that `nbytes` is from.
        seconds: for all of a body, or for each part of one that is streamed.
    """

    nbytes: int
    setting: str
    seconds: float
    streamed: bool = False

    def deadline(self, begun: float, seen: int, now: float) -> float:
        """Until when the next part must have come, on the event loop's clock."""
        if not self.streamed:
            return begun + self.seconds
        return min(now + self.seconds, begun + self.seconds + seen / _SLOWEST)

    def too_slow(self) -> SlowRequestError:
        """For a body that is late."""
        if self.streamed:
            return SlowRequestError(
                f"The body stood still for {self.seconds:g} s (body_seconds), or came more slowly than "
                f"{_SLOWEST} bytes/s; go on where it ended."
            )
        return SlowRequestError(f"The body did not arrive within {self.seconds:g} s (body_seconds).")

    def too_large(self) -> BodyTooLargeError:
        """For a body beyond the limit."""
        return BodyTooLargeError(
            f"The body is larger than {self.nbytes} bytes ({self.setting}); send less at once."
        )

    def refusal(self, announced: str) -> TwinserveError | None:
        """What is wrong with a Content-Length, if anything."""
        if not (announced.isascii() and announced.isdigit()):
            return InvalidRequestError("Content-Length must be a whole number of bytes.")
        # Compared by digits first: int() of a very long string is refused by Python itself.
        too_long = len(announced.lstrip("0")) > 18 or int(announced) > self.nbytes
        return self.too_large() if too_long else None
