"""What `/admin` routes have in common: who asks, on top of which generation, under which idempotency key."""

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from experts.registry.records import Actor
from service.api.backend import Backend
from service.api.refusals import Responses, refusals
from service.errors import InvalidRequestError, RegistryUnavailableError, TwinserveError
from service.registrar import ChangeAsked, Registrar
from service.settings import Settings

_ETAG = re.compile(r'(?:W/)?"([1-9][0-9]{0,8})"|([1-9][0-9]{0,8})')
_ADDRESS_TOLD = 64


@dataclass(frozen=True, slots=True)
class AdminParts:
    """What every file of this package needs."""

    registrar: Registrar
    settings: Settings
    backend: Backend

    @property
    def draining(self) -> bool:
        """The server takes nothing new: who waits should be let go."""
        return not self.backend.ready


@dataclass(frozen=True, slots=True)
class Expected:
    """What a change builds on.

    Attributes:
        generation: that must be the current one; None does not care.
        precondition: `If-Match` said so.
        existing: any generation will do, but there must be one (`If-Match: *`).
    """

    generation: int | None = None
    precondition: bool = False
    existing: bool = False

    def of(self, request: Request) -> ChangeAsked:
        """A change of the registrar, asked for by the caller of `request`."""
        return ChangeAsked(actor_of(request), self.generation, self.precondition)


def expected(if_match: str | None, in_body: int | None = None) -> Expected:
    """The generation that a request names by `If-Match`, by `expected_generation`, or not at all.

    Raises:
        InvalidRequestError: the header is no generation's ETag, or says something else than the body.
    """
    if if_match is None:
        return Expected(in_body)
    given = if_match.strip()
    if given == "*":
        return Expected(in_body, precondition=True, existing=True)
    found = _ETAG.fullmatch(given)
    if found is None:
        raise InvalidRequestError(
            'If-Match: must be one ETag of GET /admin/experts/{name}, like "3", or *.', param="If-Match"
        )
    number = int(found[1] or found[2])
    if in_body not in (None, number):
        raise InvalidRequestError(
            f"'expected_generation' is {in_body} and If-Match says {number}; send one of them.",
            param="expected_generation",
        )
    return Expected(number, precondition=True, existing=True)


def actor_of(request: Request) -> Actor:
    """The caller, for the audit log."""
    address = request.client.host if request.client is not None else ""
    return Actor(request.state.caller.id or "admin", address[:_ADDRESS_TOLD])


def scoped(request: Request, key: str | None) -> str | None:
    """An idempotency key, as its sender's own."""
    return None if key is None else f"{request.state.caller.id}:{key}"


def admin_refusals(*kinds: type[TwinserveError]) -> Responses:
    """Of a route that asks the registry."""
    return refusals(*kinds, RegistryUnavailableError)


class Page(BaseModel):
    """Query of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=1000, description="most items of the answer")] = 100


class Wait(BaseModel):
    """Query of what starts a job."""

    model_config = ConfigDict(extra="forbid")

    wait: Annotated[
        float,
        Field(
            ge=0,
            le=600,
            allow_inf_nan=False,
            description="seconds to wait for the job's end; what ends in time is answered as if it had been at once",
        ),
    ] = 0.0
