"""Client addresses: who is asking, what one client is taken to own, and which addresses a key may be used from."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache

IPV6_PREFIX_BITS = 64
CACHED_MAX = 10_000
HOPS_MAX = 32
UNKNOWN = "unknown"
FORWARDED_FOR = b"x-forwarded-for"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
RawHeaders = Iterable[tuple[bytes, bytes]]


class ClientAddresses:
    """Who is asking, given the networks of proxies whose X-Forwarded-For is believed."""

    def __init__(self, trusted_proxies: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted_proxies)

    def of(self, peer: str, headers: RawHeaders) -> str:
        """The peer; when that is a trusted proxy, the last address in X-Forwarded-For that is not one.

        Every proxy appends the address that it sees, to the line or as a line of its own, so only the end of the whole
        list is written by those that we trust; what stands before the first other address may be anybody's invention.
        """
        if not self._trusted or not self._is_trusted(parse_address(peer)):
            return peer
        listed = b",".join([value for name, value in headers if name == FORWARDED_FOR])
        for hop in reversed(listed.decode("latin-1").rsplit(",", HOPS_MAX)[-HOPS_MAX:]):
            address = parse_address(hop.strip())
            if address is None:
                return peer
            if not self._is_trusted(address):
                return str(address)
        return peer

    def _is_trusted(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._trusted)


@lru_cache(maxsize=CACHED_MAX)
def parse_address(text: str) -> Address | None:
    """An address, an IPv4 one in its IPv6 form as IPv4; None for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_networks(setting: str) -> tuple[Network, ...]:
    """`"10.0.0.0/8, ::1/128"` → networks. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in setting.split(",") if part.strip())


@lru_cache(maxsize=CACHED_MAX)
def owned_by(text: str) -> str:
    """What one client is taken to own, and limits by address count: an IPv4 address, or an IPv6 /64."""
    address = parse_address(text)
    if address is None:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, IPV6_PREFIX_BITS), strict=False))
    return str(address)


@lru_cache(maxsize=CACHED_MAX)
def is_within(text: str, networks: tuple[str, ...]) -> bool:
    """Whether an address is in one of the networks (CIDR). What cannot be read is in none, and contains none."""
    address = parse_address(text)
    return address is not None and any(address in network for network in _networks(networks))


@lru_cache(maxsize=CACHED_MAX)
def _networks(networks: tuple[str, ...]) -> tuple[Network, ...]:
    read = []
    for text in networks:
        try:
            read.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            continue
    return tuple(read)
