"""Which URLs registrations may read: an allow-list, compared part by part, never as text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from experts.errors import SourceError

WEB = frozenset({"https", "http"})
OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""Schemes that fsspec reads; its others reach this machine's own files."""

MAX_URL = 2048

_PORTS = {"https": 443, "http": 80}
_PATH = re.compile(r"(?:/[A-Za-z0-9._~@+=,-]+)*/?")
_QUERY = re.compile(r"[!-~]*")
_SHAPE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[!-~]+")


@dataclass(frozen=True, slots=True)
class Location:
    """A URL in parts.

    Attributes:
        host: in lower case without a final dot; the bucket of an object store.
        port: 0 where the scheme has none.
        path: begins with a slash, or is empty.
        query: of a redirect's target; empty elsewhere.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = ""

    def __str__(self) -> str:
        port = "" if self.port == _PORTS.get(self.scheme, 0) else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{port}{self.path}{'?' if self.query else ''}{self.query}"

    def child(self, name: str) -> "Location":
        """The file of that name in this folder."""
        return Location(self.scheme, self.host, self.port, f"{self.path.rstrip('/')}/{name}")


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched.

    Attributes:
        prefixes: allowed; none allows nothing.
        private: addresses of private networks and of this machine may be connected to. Those that only a cloud's
            own services have, and ones that are no machine's, are refused in any case.
        max_bytes: of all files together.
        seconds: for all files together.
        options: of the object store, as fsspec takes them.
    """

    prefixes: tuple[Location, ...]
    private: bool = False
    max_bytes: int = 64 * 2**30
    seconds: float = 600.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, url: str) -> Location:
        """The parts of a URL that an administrator has named.

        Raises:
            SourceError: malformed, with credentials or a query, or outside the allow-list; says which.
        """
        if not self.prefixes:
            raise SourceError(
                "registering from URLs is off; start the server with allowed prefixes (TWINSERVE_SOURCE_URLS)"
            )
        location = parse(url)
        if location.query:
            raise SourceError(
                "the URL has a query, which is a place for credentials; name a folder or file without one"
            )
        self.require(location)
        return location

    def require(self, location: Location) -> None:
        """Raise unless a URL, or where it redirects to, is on the allow-list.

        Raises:
            SourceError: it is not; names scheme and host.
        """
        if not any(_below(prefix, location) for prefix in self.prefixes):
            raise SourceError(
                f"{location.scheme}://{location.host} with that path is not among the allowed URL prefixes "
                "(TWINSERVE_SOURCE_URLS)"
            )


def parse(url: str) -> Location:
    """A URL in parts, if nothing in it could mean different things to different readers.

    Raises:
        SourceError: says what is wrong with it; it is not repeated where it holds credentials.
    """
    if len(url) > MAX_URL:
        raise SourceError(f"the URL has {len(url)} characters, the limit is {MAX_URL}")
    if not _SHAPE.fullmatch(url) or "\\" in url:
        raise SourceError("the URL is not plain ASCII of the form scheme://host/path")
    try:
        parts: SplitResult = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SourceError(f"the URL cannot be read: {error}") from error
    scheme = parts.scheme.lower()
    if scheme not in WEB | OBJECTS:
        raise SourceError(
            f"URLs of the scheme {scheme[:32]!r} are refused; use one of {', '.join(sorted(WEB | OBJECTS))}"
        )
    if "@" in parts.netloc or parts.username is not None:
        raise SourceError("the URL holds credentials; configure them on the server instead")
    host = (parts.hostname or "").lower().removesuffix(".")
    if not host or not re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|[0-9a-f:.]+", host):
        raise SourceError("the URL names no host, or one with characters that no host has")
    if parts.fragment or "#" in url:
        raise SourceError("the URL has a fragment; leave it out")
    if not _PATH.fullmatch(parts.path) or any(part in (".", "..") for part in parts.path.split("/")):
        raise SourceError(
            "the URL's path may have letters, digits and . _ ~ @ + = , - between single slashes, no percent signs "
            "and no dots alone"
        )
    if not _QUERY.fullmatch(parts.query):
        raise SourceError("the URL's query cannot be read")
    if scheme in OBJECTS and port is not None:
        raise SourceError(f"a {scheme} URL has no port; the server's own settings say where the store is")
    return Location(scheme, host, port or _PORTS.get(scheme, 0), parts.path, parts.query)


def parse_prefixes(prefixes: tuple[str, ...]) -> tuple[Location, ...]:
    """The allow-list of the settings.

    Raises:
        SourceError: an entry is no URL prefix; names it.
    """
    found = []
    for prefix in prefixes:
        try:
            location = parse(prefix)
        except SourceError as error:
            raise SourceError(f"source_urls: {prefix!r}: {error}") from error
        if location.query:
            raise SourceError(f"source_urls: {prefix!r} has a query; a prefix has none")
        found.append(location)
    return tuple(found)


def _below(prefix: Location, location: Location) -> bool:
    """Whether a location lies in a prefix's folder, or is it."""
    if (prefix.scheme, prefix.host, prefix.port) != (location.scheme, location.host, location.port):
        return False
    folder = prefix.path.rstrip("/")
    return location.path.rstrip("/") == folder or location.path.startswith(f"{folder}/")
