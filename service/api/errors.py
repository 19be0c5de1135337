"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.api.wire.base import FIELD_AT_FAULT, UNKNOWN_FIELD, UNSUPPORTED_FIELD
from service.errors import (
    AuthenticationError,
    BodyTooLargeError,
    InvalidRequestError,
    SlowRequestError,
    TwinserveError,
    UnsupportedFieldError,
)

_log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Logged and counted for a client that hung up; nobody receives it."""


class ClientGoneError(Exception):
    """The client closed the connection before its answer began."""


def error_body(error: TwinserveError) -> dict[str, Any]:
    """The error object of `error`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: TwinserveError, *, close: bool = False) -> JSONResponse:
    """`error` as an HTTP answer; `close` ends the connection, as it does where the body was not read."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if close or isinstance(error, BodyTooLargeError | SlowRequestError):
        headers["Connection"] = "close"  # what is left of the request will not be read
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def internal_error() -> TwinserveError:
    """What a client learns about a fault of ours: nothing but that it is ours."""
    return TwinserveError("The server failed on this request; its log says why, under the X-Request-Id.")


def field_name(location: Sequence[int | str]) -> str | None:
    """A validation error's place as the client wrote it: `messages[0].content`."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif name and not part.startswith("["):
            name += f".{part}"
        else:
            name += part
    return name or None


def from_validation(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The first of pydantic's errors as ours."""
    first = errors[0]
    location = list(first["loc"][1:])  # without FastAPI's "body" or "path"
    if first["type"] in (UNKNOWN_FIELD, UNSUPPORTED_FIELD):
        param = field_name([*location, first["ctx"]["name"]])
        if first["type"] == UNKNOWN_FIELD:
            return InvalidRequestError(f"Unknown field {param!r}; remove it.", param=param)
        return UnsupportedFieldError(f"{param!r} is not supported by this server; remove it.", param=param)
    if first["type"] == FIELD_AT_FAULT:
        param = field_name([*location, first["ctx"]["name"]])
        return InvalidRequestError(f"{param}: {first['ctx']['message']}.", param=param)
    param = field_name(location)
    message = str(first["msg"]).removeprefix("Value error, ")
    if param is None:
        told = message if first["type"] == "value_error" else "the body must be a JSON object"
        return InvalidRequestError(f"{told[:1].upper()}{told[1:]}.")
    if first["type"] == "missing":
        return InvalidRequestError(f"The field {param!r} is required.", param=param)
    return InvalidRequestError(f"{param}: {message}.", param=param)


def _from_http(error: HTTPException, request: Request) -> JSONResponse:
    """A refusal of the framework's own: no such route, wrong method, wrong content type."""
    try:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    except ValueError:
        code = "http_error"
    detail = str(error.detail)
    if error.status_code in (404, 405) and detail == HTTPStatus(error.status_code).phrase:
        detail = f"{detail}: {request.method} {request.url.path}"
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": detail, "type": kind, "param": None, "code": code}}
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _methods(request: Request) -> list[str]:
    """What the path of a request takes; the framework names the methods of its first route alone."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def install_handlers(app: FastAPI) -> None:
    """Give every exception that can leave a handler the OpenAI shape."""

    async def ours(_: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, TwinserveError) else internal_error())

    async def validation(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return error_response(from_validation(error.errors()))
        return error_response(internal_error())

    async def framework(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _from_http(error, request)
        return error_response(internal_error())

    async def gone(_: Request, error: Exception) -> Response:
        _log.debug("client gone", exc_info=error)
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(TwinserveError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ClientGoneError, gone)
