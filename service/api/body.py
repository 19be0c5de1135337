"""JSON bodies, strictly: what is not exactly JSON of sane depth never reaches a wire model."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.api.errors import ClientGoneError
from service.errors import InvalidRequestError, LimitExceededError
from service.record import current

_log = logging.getLogger(__name__)

_MODEL_TOLD = 128
_BODY_LOGGED = 16384
"""Characters of a model's name, bytes of a body, that logs show."""

# A string is possessive and may lack its end, so that no input makes the scan start over: it stays linear.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.?+)*+"?+|[\[{]|[\]}]', re.DOTALL)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape that is a half; most often its other half follows."""


def json_depth(body: bytes) -> int:
    """Deepest nesting of arrays and objects in JSON text, brackets inside strings not counted."""
    depth = deepest = 0
    for match in _TOKENS.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {number[:64]} is beyond the largest one")
    return value


def _check_text(value: Any) -> None:
    """Refuse half of a surrogate pair: JSON can escape it, but no answer could repeat it, nor any model read it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InvalidRequestError(
            f"The body's text cannot be encoded: {half!r} is half of a surrogate pair."
        ) from error


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with a name twice means different things to different readers: refuse it."""
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {repeated[:64]!r} is given twice in one object")
    return result


def parse_json(body: bytes, max_depth: int) -> Any:
    """Parse RFC 8259 JSON: UTF-8, finite numbers, no repeated names, whole characters, bounded nesting.

    Raises:
        InvalidRequestError: not such JSON.
        LimitExceededError: nested deeper than `max_depth`.
    """
    # Counting is cheap and nearly always settles it; the exact scan is for what remains.
    if body.count(b"[") + body.count(b"{") > max_depth and json_depth(body) > max_depth:
        raise LimitExceededError(f"The body nests deeper than {max_depth} levels (max_json_depth).")
    try:
        parsed = json.loads(
            body.decode(),
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_repeats,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from error
    if _SURROGATE.search(body):
        _check_text(parsed)
    return parsed


class _ParsedRequest(Request):
    """A request whose JSON has been parsed already."""

    parsed: Any = None

    async def json(self) -> Any:
        """The parsed body."""
        return self.parsed


def _note(body: bytes, parsed: Any, log_bodies: bool) -> None:
    """Remember which model is asked; log the body only where the operator wants prompts in the log."""
    record = current()
    if record is not None and isinstance(parsed, dict) and isinstance(parsed.get("model"), str):
        record.model = parsed["model"][:_MODEL_TOLD]
    if log_bodies:
        _log.info("request body", extra={"fields": {"body": body[:_BODY_LOGGED].decode(errors="replace")}})


def content_type(headers: Headers) -> str:
    """Without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _has_no_body(request: Request) -> bool:
    """Nothing was sent, and nothing was said of it (RFC 9112, section 6)."""
    headers = request.headers
    return (
        headers.get("content-length", "0") == "0"
        and "transfer-encoding" not in headers
        and "content-type" not in headers
    )


def json_route(max_depth: int, *, log_bodies: bool = False) -> type[APIRoute]:
    """A route class that parses bodies with `parse_json` before FastAPI sees them."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle
            required = self.body_field.field_info.is_required()

            async def parse_then_handle(request: Request) -> Response:
                if not required and _has_no_body(request):
                    return await handle(request)
                kind = content_type(request.headers)
                if kind != "application/json":
                    raise HTTPException(
                        415, f"Send the body as Content-Type: application/json, not {kind or 'without one'}."
                    )
                parsed = _ParsedRequest(request.scope, request.receive)
                try:
                    body = await parsed.body()
                except ClientDisconnect as error:
                    raise ClientGoneError from error
                if not body:
                    raise InvalidRequestError("The body is empty; send a JSON object.")
                parsed.parsed = parse_json(body, max_depth)
                _note(body, parsed.parsed, log_bodies)
                return await handle(parsed)

            return parse_then_handle

    return JsonRoute
