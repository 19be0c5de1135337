"""For the OpenAPI document: what an endpoint may answer instead, told by the classes of the error tree."""

import inspect
from collections.abc import Mapping
from typing import Any

from service import errors
from service.api.headers import GENERATIONS, PATTERN, ROUTER_GENERATION
from service.errors import TwinserveError

Responses = dict[int | str, dict[str, Any]]

ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}

ANYWHERE = (
    errors.SlowRequestError,
    errors.SlowClientError,
    errors.UrlTooLongError,
    errors.HeaderTooLargeError,
    TwinserveError,
)
"""What every route may refuse, whoever asks."""

LOCKED = (errors.AuthenticationError, errors.RateLimitedError, errors.ShuttingDownError)
"""What every route but the open ones may."""

WITH_BODY = (
    errors.InvalidRequestError,
    errors.UnsupportedFieldError,
    errors.LimitExceededError,
    errors.BodyTooLargeError,
)
"""What every route that reads a body may."""

NAMING = (
    errors.ExpertNotLoadedError,
    errors.ExpertUnavailableError,
    errors.RegistryUnavailableError,
)
"""What a route that names experts may, of those that are registered and not here."""

_ENGINE = (
    errors.ModelNotFoundError,
    errors.UnknownExpertError,
    errors.ContextLengthError,
    errors.QueueFullError,
    errors.RequestFailedError,
    errors.EngineDeadError,
    *NAMING,
)

_OTHERS = {415: ("unsupported_media_type", "The body is not JSON, or the header does not say so.")}
"""Of the framework: status → code and what it means."""


def refusals(*kinds: type[TwinserveError]) -> Responses:
    """Status → the description and one example of each error that has it."""
    found: Responses = {}
    for kind in kinds:
        summary = (inspect.getdoc(kind) or "").split("\n")[0]
        if kind is TwinserveError:
            summary = "A fault of the server's own; its log says why."
        _add(found, kind.status, kind.code, kind.type, summary)
    return found


def with_body() -> Responses:
    """What every route that reads a body may refuse, the framework's refusals too."""
    found = refusals(*WITH_BODY)
    for status, (code, summary) in _OTHERS.items():
        _add(found, status, code, "invalid_request_error", summary)
    return found


def merged(*parts: Responses) -> Responses:
    """All of them; of one status the examples and sentences of each."""
    found: Responses = {}
    for part in parts:
        for status, told in part.items():
            known = found.setdefault(status, {"description": "", "content": _content()})
            examples = told["content"]["application/json"]["examples"]
            known["content"]["application/json"]["examples"] |= examples
            known["description"] = described(known["description"], examples)
    return found


def _add(found: Responses, status: int, code: str, kind: str, summary: str) -> None:
    known = found.setdefault(status, {"description": "", "content": _content()})
    value = {"error": {"message": summary, "type": kind, "param": None, "code": code}}
    examples = known["content"]["application/json"]["examples"]
    examples[code] = {"summary": summary, "value": value}
    known["description"] = described(known["description"], examples)


def _content() -> dict[str, Any]:
    return {"application/json": {"schema": ERROR, "examples": {}}}


def described(text: str, examples: Mapping[str, Any]) -> str:
    """A description that says what each example means, once."""
    for example in examples.values():
        if example["summary"] not in text:
            text = f"{text} {example['summary']}".strip()
    return text


_STREAMED = {
    "text/event-stream": {
        "schema": {"description": "Server-sent events."},
        "example": 'data: {"id": "…", "choices": [{"index": 0, …}]}\n\ndata: [DONE]\n\n',
    }
}
_HEADERS = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        PATTERN: "Gates and generations that made the answer.",
        GENERATIONS: "Expert=generation, separated by commas.",
        ROUTER_GENERATION: "Of the router, where it chose.",
    }.items()
}
ANSWERED: Responses = {200: {"content": _STREAMED, "headers": _HEADERS}}
"""Of an answer that can be a stream."""

ROUTING: Responses = merged(refusals(*ANYWHERE, *LOCKED), with_body(), refusals(*_ENGINE))
"""Of an endpoint that asks the engine."""

GENERATING: Responses = merged(ROUTING, refusals(errors.DeadlineExceededError, errors.ConflictError))
"""Of one that generates."""
