"""Who may call what: closed unless listed as open, keys compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.datastructures import Headers

from service.errors import AdminDisabledError, AuthenticationError

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/version"})
"""Probes and scrapes: they tell no prompt, answer or expert's content. Everything else needs a key."""

ADMIN_PREFIX = "/admin"

_CLIENT_DIGITS = 16


def _digest(key: str) -> bytes:
    """Equal lengths for `compare_digest`, whatever the client sent."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Gatekeeper:
    """Checks a path and its headers.

    Args:
        api_keys: for everything but `/admin`; none leaves that open.
        admin_key: for `/admin`; None closes it altogether.
    """

    def __init__(self, api_keys: Iterable[SecretStr], admin_key: SecretStr | None) -> None:
        self._api = tuple(_digest(key.get_secret_value()) for key in api_keys)
        self._admin = None if admin_key is None else _digest(admin_key.get_secret_value())

    def check(self, path: str, headers: Headers) -> str:
        """Pass, or raise.

        Returns:
            Who it is, for fair shares: the same for the same API key, which it does not give away; empty where
            no key is needed.

        Raises:
            AdminDisabledError: `/admin` without a configured key.
            AuthenticationError: the key is missing or wrong.
        """
        if path in OPEN_PATHS:
            return ""
        if path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/"):
            if self._admin is None:
                raise AdminDisabledError(
                    "The admin API is off: start the server with TWINSERVE_ADMIN_KEY set, then send that key."
                )
            self._require(headers, (self._admin,), "the admin key (TWINSERVE_ADMIN_KEY)")
        elif self._api:
            # Whatever a client sends to an open server must not make it a client of its own.
            return self._require(headers, self._api, "an API key").hex()[:_CLIENT_DIGITS]
        return ""

    def _require(self, headers: Headers, accepted: tuple[bytes, ...], what: str) -> bytes:
        given = _given_key(headers)
        if given is None:
            raise AuthenticationError(f"Send {what} as `Authorization: Bearer KEY` or `X-API-Key: KEY`.")
        digest = _digest(given)
        # No early exit: the time must not tell which key was nearly right.
        if not sum(hmac.compare_digest(digest, known) for known in accepted):
            raise AuthenticationError(f"The key is wrong; send {what}.")
        return digest


def _given_key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
