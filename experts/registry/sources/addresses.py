"""From a host's name to an address that may be connected to."""

import ipaddress
import socket
from collections.abc import Callable, Sequence

from experts.errors import SourceError, SourceUnavailableError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) → its addresses as text."""

_CLOUDS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
        "fd00:ec2::/32",
    )
)
"""Where clouds tell machines their credentials; nothing that an expert comes from."""

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 addresses as networks of IPv6 alone see them."""


def system_resolver(host: str, port: int) -> Sequence[str]:
    """What the operating system says.

    Raises:
        SourceUnavailableError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise SourceUnavailableError(f"the host {host!r} cannot be resolved: {error}") from error
    return [str(entry[4][0]) for entry in found]


def checked_address(host: str, port: int, *, private: bool, resolve: Resolver) -> str:
    """An address of a host, after all of its addresses were checked.

    A name with one forbidden address is refused altogether: which one a connection takes must not be luck.

    Raises:
        SourceError: an address is private, this machine's, or nobody's.
        SourceUnavailableError: the name cannot be resolved.
    """
    found = [ipaddress.ip_address(text.partition("%")[0]) for text in resolve(host, port)]
    if not found:
        raise SourceUnavailableError(f"the host {host!r} has no address")
    for address in found:
        problem = _problem(address, private)
        if problem:
            raise SourceError(
                f"the host {host!r} leads to {address}, {problem}; such addresses may not be registered from"
            )
    return str(found[0])


def _problem(address: Address, private: bool) -> str | None:
    for meant in (address, *_embedded(address)):
        if any(meant in network for network in _CLOUDS):
            return "a cloud's metadata service or link"
        if meant.is_unspecified or meant.is_multicast or meant.is_link_local:
            return "which is no single machine's address"
        if meant.is_reserved and not meant.is_loopback and meant not in _TRANSLATED:
            return "which is reserved"
        if not private and not meant.is_global:
            return "which is private or this machine's own (source_private)"
        if private and not (meant.is_global or meant.is_private or meant.is_loopback):
            return "which is no public and no private machine's address"
    return None


def _embedded(address: Address) -> Sequence[Address]:
    """IPv4 addresses that packets to an IPv6 address end at."""
    if not isinstance(address, ipaddress.IPv6Address):
        return ()
    found: list[Address] = [inner for inner in (address.ipv4_mapped, address.sixtofour) if inner is not None]
    if address.teredo is not None:
        found += address.teredo
    if address in _TRANSLATED or (int(address) >> 32 == 0 and int(address) > 1):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found
