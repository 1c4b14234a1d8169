"""Whom a request comes from: only what trusted proxies wrote is believed."""

import pytest

from services.gateway.addresses import ClientAddresses, is_within, owned_by, parse_networks

TRUSTED = parse_networks("10.0.0.0/8, ::1/128")


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),  # not from a proxy of ours
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.7"], "198.51.100.7"),  # the first is the client's own invention
        ("10.0.0.1", ["203.0.113.9", "198.51.100.7"], "198.51.100.7"),  # also when each proxy writes its own line
        ("10.0.0.1", ["198.51.100.7, 10.0.0.2", "10.1.2.3"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9,"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("::1", ["2001:db8::7"], "2001:db8::7"),
        ("", ["198.51.100.7"], ""),
        ("10.0.0.1", [", ".join(["203.0.113.9"] * 5_000 + ["10.0.0.9"] * 40)], "10.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_no_trusted_proxy_has(peer: str, lines: list[str], client: str) -> None:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", line.encode()) for line in lines)]
    assert ClientAddresses(TRUSTED).of(peer, headers) == client


def test_without_trusted_proxies_the_header_means_nothing() -> None:
    assert ClientAddresses().of("10.0.0.1", [(b"x-forwarded-for", b"198.51.100.7")]) == "10.0.0.1"


@pytest.mark.parametrize(
    ("address", "owned"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("unix", "unknown"),
    ],
)
def test_one_client_owns(address: str, owned: str) -> None:
    assert owned_by(address) == owned


@pytest.mark.parametrize(
    ("address", "networks", "within"),
    [
        ("192.0.2.1", ("192.0.2.0/24",), True),
        ("192.0.3.1", ("192.0.2.0/24",), False),
        ("192.0.3.1", ("192.0.2.0/24", "192.0.3.1"), True),
        ("::ffff:192.0.2.1", ("192.0.2.0/24",), True),
        ("2001:db8::1", ("192.0.2.0/24", "2001:db8::/32"), True),
        ("192.0.2.1", (), False),
        ("192.0.2.1", ("nonsense",), False),
        ("nonsense", ("0.0.0.0/0", "::/0"), False),
    ],
)
def test_networks_contain_addresses_of_their_own_kind(address: str, networks: tuple[str, ...], within: bool) -> None:
    assert is_within(address, networks) is within
