"""Where webhooks may go: public addresses by HTTPS, whatever a name resolves to at the moment of sending.

The address that was examined is the address that is connected to: the resolver is the connector's own, so that a name
that answers otherwise a moment later gains nothing. Redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from services.billing.errors import UnsafeDestination

URL_CHARS_MAX = 2_000
PORTS_BELOW_1024 = frozenset((443,))
# Public by their own number, but the way to an IPv4 address within: NAT64, 6to4, Teredo.
UNICAST = ipaddress.ip_network("2000::/3")  # what IANA gives out: not fec0::/10, say, which was for sites once
TRANSLATED = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Whether an address is a host's on the internet: not private, local, shared, multicast, reserved or translated."""
    found: IPv4Address | IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found not in UNICAST or any(found in network for network in TRANSLATED):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def check_url(url: str, *, private: bool) -> None:
    """Raise UnsafeDestination for an address that no message goes to. `private` allows http and every address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UnsafeDestination() from None
    if len(url) > URL_CHARS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise UnsafeDestination()
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise UnsafeDestination()
    if private and parts.scheme in ("http", "https"):
        return
    if parts.scheme != "https" or (port is not None and port < 1024 and port not in PORTS_BELOW_1024):
        raise UnsafeDestination()
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return  # a name: what it stands for is examined when it is resolved
    if not is_public(str(literal)):
        raise UnsafeDestination()


class PublicResolver(AbstractResolver):
    """Answers only when every address of a name is public. Raises OSError otherwise."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not found or not all(is_public(result["host"]) for result in found):
            raise OSError(None, "not a public address")
        return found

    async def close(self) -> None:
        await self._resolver.close()
