"""What a key that makes or changes keys may give them: nothing that it has not itself.

Scopes and models are checked for everybody who makes keys (check_scopes, check_models); limits, addresses and expiry
bound only keys, since people have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_network

from services.auth.domain import LIMIT_NAMES, ApiKey, exceeds
from services.auth.errors import BeyondOwnKey


def within(made: ApiKey, maker: ApiKey, limits: Mapping[str, int | None]) -> ApiKey:
    """A new key within its maker: what was left open is the maker's. `limits` are those that were asked for.

    With limits of the maker's own it draws on the maker's counters, so that more keys are no more requests. Raises
    BeyondOwnKey.
    """
    inherited = {
        name: getattr(maker.limits, name)
        for name in LIMIT_NAMES
        if limits.get(name) is None and exceeds(name, getattr(made.limits, name), getattr(maker.limits, name))
    }
    bounded = replace(
        made,
        overrides={**made.overrides, **inherited},
        limit_id=maker.limit_id if maker.overrides else made.limit_id,
        allowed_addresses=maker.allowed_addresses if made.allowed_addresses is None else made.allowed_addresses,
        expires_at=made.expires_at or maker.expires_at,
    )
    check_within(bounded, maker)
    return bounded


def check_within(key: ApiKey, maker: ApiKey) -> None:
    """Raise BeyondOwnKey where a key's limits, addresses or expiry reach further than another's."""
    check_limits(key, maker)
    check_addresses(key.allowed_addresses, maker.allowed_addresses)
    _check_expiry(key.expires_at, maker.expires_at)


def check_limits(key: ApiKey, maker: ApiKey) -> None:
    for name in LIMIT_NAMES:
        if exceeds(name, getattr(key.limits, name), getattr(maker.limits, name)):
            raise BeyondOwnKey(param=f"limits.{name}")


def check_addresses(wanted: tuple[str, ...] | None, held: tuple[str, ...] | None) -> None:
    if held is None:
        return
    networks = [ip_network(network) for network in held]
    if wanted is None or not all(any(_covers(outer, ip_network(inner)) for outer in networks) for inner in wanted):
        raise BeyondOwnKey(param="allowed_addresses")


def _covers(outer: IPv4Network | IPv6Network, inner: IPv4Network | IPv6Network) -> bool:
    if isinstance(outer, IPv4Network):
        return isinstance(inner, IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and inner.subnet_of(outer)


def _check_expiry(wanted: datetime | None, held: datetime | None) -> None:
    if held is not None and (wanted is None or wanted > held):
        raise BeyondOwnKey(param="expires_at")
