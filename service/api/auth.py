"""Who may call what: closed unless listed as open, keys compared in constant time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from service.errors import AdminDisabledError, AuthenticationError
from service.keys import Key, KeyLimits, Keys, find

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version"})
"""Probes and the version: they tell nothing of prompts, answers, experts or clients. All else needs a key."""

METRICS_PATH = "/metrics"

ADMIN_PREFIX = "/admin"

ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What changes the experts under a name that other servers gave it."""

ADMIN_WRITES = frozenset({"/lora-adapters"})
"""What every client may read there, and an operator alone may change."""

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who has called.

    Attributes:
        id: of its key, which it does not give away; empty where no key is needed.
        limits: of its key.
        metered: limits apply to it.
    """

    id: str = ""
    limits: KeyLimits = field(default_factory=KeyLimits)
    metered: bool = False


class Gatekeeper:
    """Checks a path and its headers.

    Args:
        keys: no inference keys leave inference open; no admin keys close `/admin` altogether.
        metrics_open: `/metrics` needs no key.
    """

    def __init__(self, keys: Keys, *, metrics_open: bool = False) -> None:
        self._keys = keys
        self._metrics_open = metrics_open

    def check(self, path: str, headers: Headers, method: str = "GET") -> Caller:
        """Pass, or raise. The path is the very text that the routes are matched with, so that nothing slips by.

        Patterns of routes end in `$`, which overlooks a line feed at the end of a path: it counts for nothing here.

        Raises:
            AdminDisabledError: `/admin` without a configured key.
            AuthenticationError: the key is missing or wrong.
        """
        path = path.removesuffix("\n")
        if path in OPEN_PATHS:
            return Caller()
        inference, admin = self._keys.inference, self._keys.admin
        writes = path in ADMIN_WRITES and method not in _READS
        if path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/") or path in ADMIN_PATHS or writes:
            if not admin:
                raise AdminDisabledError(
                    "The admin API is off: start the server with TWINSERVE_ADMIN_KEY set, then send that key."
                )
            return Caller(_require(headers, admin, "the admin key (TWINSERVE_ADMIN_KEY)").id)
        if not inference:
            # Whatever a client sends to an open server must not make it a client of its own.
            return Caller(metered=path != METRICS_PATH)
        if path == METRICS_PATH:
            if self._metrics_open:
                return Caller()
            return Caller(_require(headers, (*inference, *admin), "an API key or the admin key").id)
        key = _require(headers, inference, "an API key")
        return Caller(key.id, key.limits, metered=True)


def _require(headers: Headers, accepted: Sequence[Key], what: str) -> Key:
    given = _given_key(headers)
    if given is None:
        raise AuthenticationError(f"Send {what} as `Authorization: Bearer KEY` or `X-API-Key: KEY`.")
    key = find(accepted, given)
    if key is None:
        raise AuthenticationError(f"The key is wrong; send {what}.")
    return key


def _given_key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
