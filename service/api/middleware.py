"""Pure ASGI layers around every route, outermost first: observe, authenticate, bound the body."""

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Gatekeeper
from service.api.errors import error_response, internal_error
from service.errors import BodyTooLargeError, InvalidRequestError, TwinserveError
from service.metrics import Metrics

_log = logging.getLogger("service.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observe:
    """Gives each request an id, a log line and a count; turns an unexpected exception into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrived=started)

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            # The outermost net: whatever it is, the client gets an answer and the log the trace.
            _log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status == 0:
                await error_response(internal_error())(scope, receive, observed)
            else:
                raise
        finally:
            self._record(scope, request_id, status, time.monotonic() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.on_http(method, route, status, seconds)
        quiet = route.startswith("/health") or route == "/metrics"
        fields: dict[str, Any] = {"request_id": request_id, "status": status, "seconds": round(seconds, 4)}
        level = logging.DEBUG if quiet else logging.INFO
        _log.log(level, "%s %s", scope["method"], scope["path"], extra={"fields": fields})


class Authenticate:
    """Asks the gatekeeper before anything of the request is read; what it does not know is closed."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self._app = app
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http":
            try:
                client = self._gatekeeper.check(scope["path"], Headers(scope=scope))
            except TwinserveError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["client"] = client
        await self._app(scope, receive, send)


class LimitBody:
    """Stops reading a body at the limit, whether its length was announced or it comes in chunks."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length")
        if announced is not None:
            refusal = self._refusal(announced)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _refusal(self, announced: str) -> TwinserveError | None:
        if not (announced.isascii() and announced.isdigit()):
            return InvalidRequestError("Content-Length must be a whole number of bytes.")
        # Compared by digits first: int() of a very long string is refused by Python itself.
        too_long = len(announced.lstrip("0")) > 18 or int(announced) > self._max_bytes
        return self._too_large() if too_long else None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"The body is larger than {self._max_bytes} bytes (max_body_bytes); send less at once."
        )
