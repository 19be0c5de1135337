"""Requests to `/admin`, tried again where that is safe, and answers or one clear error."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 120.0
_ATTEMPTS = 6
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 10.0
_LATER = frozenset({429, 502, 503, 504})


class RemoteError(Exception):
    """What a command ends with, code 1."""

    def __init__(self, message: str, code: str = "unreachable", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {"error": {"code": self.code, "message": self.message, "param": self.param}}


class UnreachableError(RemoteError):
    """No server answers there, or it stopped answering."""


class RefusedError(RemoteError):
    """The server's own refusal.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None) -> None:
        super().__init__(message, code, param)
        self.status = status


class Server:
    """One server's admin API.

    Args:
        url: its root.
        key: the admin key; empty sends none.
        pause: called with seconds between two attempts.
    """

    def __init__(self, url: str, key: str, pause: Callable[[float], None] = time.sleep) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(
            base_url=self.url,
            headers={**headers, "User-Agent": "twinserve-cli"},
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        )
        self._pause = pause

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        again: bool | None = None,
    ) -> Any:
        """The JSON answer of one request.

        Args:
            again: it may be sent twice; GET and PUT by default.

        Raises:
            RefusedError: the server says no.
            UnreachableError: it does not say anything.
        """
        repeats = method in ("GET", "PUT") if again is None else again
        attempt = 0
        while True:
            attempt += 1
            last = not repeats or attempt >= _ATTEMPTS
            try:
                answer = self._client.request(
                    method,
                    path,
                    json=body,
                    params={name: value for name, value in (query or {}).items() if value is not None},
                    headers=dict(headers or {}),
                    content=content,
                )
            except httpx.HTTPError as error:
                if last or (isinstance(error, httpx.ConnectError) and attempt >= 2):
                    raise self.unreachable(error) from error
                self._pause(_PAUSE_SECONDS * 2**attempt)
                continue
            if answer.status_code in _LATER and not last:
                self._pause(_later(answer, _PAUSE_SECONDS * 2**attempt))
                continue
            if answer.is_error:
                raise refusal(answer)
            return _json(answer)

    @contextlib.contextmanager
    def stream(
        self,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> Iterator[httpx.Response]:
        """One answer as it comes.

        Args:
            patience: seconds of silence after which the connection counts as lost; None is any.

        Raises:
            RefusedError: the server says no.
            UnreachableError: it does not answer, or stops.
        """
        timeout = httpx.Timeout(patience, connect=_CONNECT_SECONDS)
        chosen = {name: value for name, value in (query or {}).items() if value is not None}
        try:
            with self._client.stream(
                "GET", path, params=chosen, headers=dict(headers or {}), timeout=timeout
            ) as answer:
                if answer.is_error:
                    answer.read()
                    raise refusal(answer)
                yield answer
        except httpx.HTTPError as error:
            raise self.unreachable(error) from error

    def unreachable(self, error: Exception) -> UnreachableError:
        """In the operator's words."""
        return UnreachableError(
            f"{self.url} does not answer ({error or type(error).__name__}); is the server running there? "
            "--url or TWINSERVE_URL says where"
        )


def refusal(answer: httpx.Response) -> RefusedError:
    """The server's error, whatever its shape."""
    try:
        told = answer.json()["error"]
        return RefusedError(answer.status_code, str(told["message"]), str(told["code"]), told.get("param"))
    except (ValueError, KeyError, TypeError):
        return RefusedError(
            answer.status_code, f"HTTP {answer.status_code} {answer.reason_phrase}", "http_error", None
        )


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise UnreachableError(
            f"{answer.url.host} answered something that is no twinserve's; is --url right?"
        ) from error


def _later(answer: httpx.Response, otherwise: float) -> float:
    try:
        asked = float(answer.headers.get("retry-after", otherwise))
    except ValueError:
        asked = otherwise
    return min(max(asked, 0.0), _LONGEST_PAUSE_SECONDS)
