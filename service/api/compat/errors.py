"""Refusals in the words of other servers, for routes whose clients read those alone.

What is refused before a route is reached (a wrong key, a rate limit, a body that is announced too large) keeps
OpenAI's shape: nothing there knows which server a client takes this one for.
"""

import math
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from service.api.errors import from_validation
from service.api.refusals import ANSWERED, GENERATING, Responses
from service.api.wire.answers import ErrorAnswer
from service.errors import InvalidRequestError, QueueFullError, RequestFailedError, TwinserveError

Shape = Callable[[TwinserveError, int], tuple[int, dict[str, Any]]]
"""An error and its HTTP status → the status and the body that the other server would send."""


def llamacpp_shape(error: TwinserveError, status: int) -> tuple[int, dict[str, Any]]:
    """`{"error": {"code", "message", "type"}}`: OpenAI's but for a numeric code; `param` is our addition."""
    fields = {"code": status, "message": error.message, "type": error.type, "param": error.param}
    return status, {"error": fields}


def lorax_shape(error: TwinserveError, status: int) -> tuple[int, dict[str, Any]]:
    """`{"error", "error_type"}`, with the statuses and types from which its client makes its exceptions."""
    kind = error.code
    if status in (400, 422):
        status, kind = 422, "validation"
    elif isinstance(error, QueueFullError):
        kind = "overloaded"
    elif isinstance(error, RequestFailedError):
        status, kind = 424, "generation"
    return status, {"error": error.message, "error_type": kind}


def documented(model: type[BaseModel], moved: Mapping[int, int], event: str) -> Responses:
    """For the OpenAPI document: what an endpoint that generates may answer besides one JSON object.

    Args:
        model: the shape of refusals; those that come before the route have ours.
        moved: our status → another one that the endpoint has instead.
        event: the last one of a stream.
    """
    stream = {"schema": {"description": "Server-sent events."}, "example": f"data: {event}\n\n"}
    headers = ANSWERED[200]["headers"]
    found: Responses = {200: {"content": {"text/event-stream": stream}, "headers": headers}}
    for status, one in refused(model, GENERATING).items():
        found[status] = one
        if int(status) in moved:
            found[moved[int(status)]] = one
    return found


def refused(model: type[BaseModel], told: Responses) -> Responses:
    """The same refusals in the shape of `model`; those that come before the route have ours."""
    return {
        status: {"description": one["description"], "model": model | ErrorAnswer}
        for status, one in told.items()
    }


def shaped(base: type[APIRoute], shape: Shape) -> type[APIRoute]:
    """A route class like `base` whose refusals have another shape."""

    def refusal(error: TwinserveError, status: int, headers: Mapping[str, str] | None = None) -> Response:
        status, body = shape(error, status)
        sent = dict(headers or {})
        if error.retry_after is not None:
            sent["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        return JSONResponse(body, status_code=status, headers=sent)

    class ShapedRoute(base):  # type: ignore[misc, valid-type]
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def answer(request: Request) -> Response:
                try:
                    response: Response = await handle(request)
                except TwinserveError as error:
                    return refusal(error, error.status)
                except RequestValidationError as error:
                    refused = from_validation(error.errors())
                    return refusal(refused, refused.status)
                except HTTPException as error:
                    return refusal(InvalidRequestError(str(error.detail)), error.status_code, error.headers)
                return response

            return answer

    return ShapedRoute


@contextmanager
def in_words(names: Mapping[str, str]) -> Iterator[None]:
    """Where another server's body has become ours: what is wrong with ours is told of the client's own field.

    Args:
        names: our field → the client's.

    Raises:
        TwinserveError: what was raised inside, renamed.
    """
    try:
        try:
            yield
        except ValidationError as error:
            raise from_validation(
                [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            ) from error
    except TwinserveError as error:
        ours = error.param
        if ours is not None and ours in names:
            place = re.compile(rf"^('?){re.escape(ours)}\b")
            error.message = place.sub(lambda found: found[1] + names[ours], error.message, count=1)
            error.param = names[ours]
        raise
