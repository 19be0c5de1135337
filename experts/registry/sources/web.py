"""Files over HTTP, each connection made to the very address that was checked, each redirect checked anew."""

import contextlib
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urljoin

import httpx

from experts.errors import SourceError, SourceUnavailableError
from experts.registry.sources.addresses import Resolver, checked_address, system_resolver
from experts.registry.sources.policy import WEB, FetchPolicy, Location, parse
from experts.registry.sources.remote import Remote, RemoteFile

_MAX_HOPS = 5
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MISSING = frozenset({403, 404, 410})
"""Object stores answer 403 for what is not there to those who may not list."""


class Web(Remote):
    """Reads what lies below one http or https URL.

    Args:
        policy: asked before every connection.
        resolve: a host's addresses.
        trust: certificates to trust; the system's where None.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        deadline: float,
        resolve: Resolver = system_resolver,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._deadline = deadline
        self._resolve = resolve
        # No proxy, no .netrc: only what is written here decides where a connection goes.
        self._client = httpx.Client(
            follow_redirects=False,
            trust_env=False,
            timeout=_TIMEOUT,
            verify=trust if trust is not None else True,
        )

    def close(self) -> None:
        """Let go of all connections."""
        self._client.close()

    @contextlib.contextmanager
    def open(self, location: Location) -> Iterator[RemoteFile | None]:
        """One file as it is sent; None where there is none.

        Raises:
            SourceError: it redirects to where the policy does not allow.
            SourceUnavailableError: no answer, or no success.
        """
        for _ in range(_MAX_HOPS):
            with self._get(location) as answer:
                if answer.is_redirect:
                    location = self._next(location, answer.headers.get("location", ""))
                    continue
                if answer.status_code in _MISSING:
                    yield None
                    return
                if answer.status_code != 200:
                    raise SourceUnavailableError(
                        f"{location.host} answers {answer.status_code} for {location.path}"
                    )
                if answer.headers.get("content-encoding", "identity").lower() != "identity":
                    raise SourceUnavailableError(
                        f"{location.host} sends {location.path} compressed, which was not asked for"
                    )
                yield RemoteFile(_announced(answer), self._chunks(location, answer))
                return
        raise SourceError(f"more than {_MAX_HOPS} redirects; name the URL that they lead to")

    @contextlib.contextmanager
    def _get(self, location: Location) -> Iterator[httpx.Response]:
        """The answer of one hop, its body unread."""
        address = checked_address(
            location.host, location.port, private=self._policy.private, resolve=self._resolve
        )
        request = self._client.build_request(
            "GET",
            httpx.URL(
                scheme=location.scheme,
                host=address,
                port=location.port,
                raw_path=(location.path or "/").encode()
                + (f"?{location.query}".encode() if location.query else b""),
            ),
            headers={"Host": _authority(location), "Accept-Encoding": "identity"},
            # The certificate must be the name's, not the address's.
            extensions={"sni_hostname": location.host},
        )
        with _failing(location):
            answer = self._client.send(request, stream=True)
        try:
            yield answer
        finally:
            answer.close()

    def _next(self, location: Location, target: str) -> Location:
        """Where a redirect leads, if the policy allows it."""
        where = parse(urljoin(str(location), target))
        if where.scheme not in WEB or (location.scheme == "https" and where.scheme != "https"):
            raise SourceError(
                f"{location.host} redirects from {location.scheme} to {where.scheme}, which is refused"
            )
        self._policy.require(where)
        return where

    def _chunks(self, location: Location, answer: httpx.Response) -> Iterator[bytes]:
        with _failing(location):
            for chunk in answer.iter_raw():  # as it comes: whoever drips is found out
                if time.monotonic() > self._deadline:
                    raise SourceUnavailableError(
                        f"fetching from {location.host} took longer than {self._policy.seconds:g} s"
                    )
                yield chunk


@contextlib.contextmanager
def _failing(location: Location) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise SourceUnavailableError(f"{location.host} does not answer in time") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceUnavailableError(f"{location.host} cannot be read: {error}") from error


def _authority(location: Location) -> str:
    """The Host header."""
    text = str(Location(location.scheme, location.host, location.port, ""))
    return text.partition("://")[2]


def _announced(answer: httpx.Response) -> int | None:
    length = answer.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
