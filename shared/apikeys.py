"""API keys: format, codec and names, shared by auth (which makes them) and the gateway (which checks them).

    tg_live_<43 base62: 256 random bits>_<6 base62: CRC-32 of all before the last underscore>

Double-click selects a whole key; the checksum rejects junk before any lookup; PATTERN is published for secret
scanners. At rest there is only HMAC-SHA-256 under a server pepper: a 256-bit secret needs no slow hash (NIST SP
800-63B §5.1.2.2). Peppers have versions, `"1:base64[,2:…]"`, the first is current; a lookup tries them all.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

from shared.identity import parse_key_ring

PREFIX = "tg_live_"
PATTERN = re.compile(r"tg_live_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
CACHE_TTL_S = 300
RECORD_VERSION = 1
CHANNEL = "tollgate:keys"  # pub/sub: a message is the hex digest of a key that changed
USAGE_STREAM = "tollgate:usage"  # stream: gateways add an entry a request, field `event` (JSON: v, at, key_id, …)

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_CHARS = 43
_CHECKSUM_CHARS = 6
_LENGTH = len(PREFIX) + _SECRET_CHARS + 1 + _CHECKSUM_CHARS
_VISIBLE_CHARS = 4


def generate() -> str:
    """A new key: 256 bits from the system's generator."""
    body = PREFIX + _base62(secrets.randbits(256), _SECRET_CHARS)
    return f"{body}_{_checksum(body)}"


def may_be_key(text: str) -> bool:
    """Whether it begins and is as long as a key: what a lookup in memory may be spent on."""
    return len(text) == _LENGTH and text.startswith(PREFIX)


def is_well_formed(key: str) -> bool:
    """Whether the shape and the checksum are right. Says nothing about the key being known."""
    if len(key) != _LENGTH or not PATTERN.fullmatch(key):
        return False
    body, _, checksum = key.rpartition("_")
    return hmac.compare_digest(_checksum(body), checksum)


def display_prefix(key: str) -> str:
    """What may be shown of a key later: `tg_live_` and four characters."""
    return key[: len(PREFIX) + _VISIBLE_CHARS]


@dataclass(frozen=True, slots=True)
class Digest:
    """A key at rest: which pepper, and the HMAC's 64 hexadecimal digits."""

    pepper: int
    hex: str


class Peppers:
    """The pepper ring. `digest` is for new keys; `candidates` for looking one up."""

    def __init__(self, setting: str) -> None:
        self._keys = {int(version): secret for version, secret in parse_key_ring(setting).items()}
        self._current = next(iter(self._keys))

    def digest(self, key: str) -> Digest:
        return self._digest(key, self._current)

    def candidates(self, key: str) -> list[Digest]:
        """The digests under which a key may be stored, the current pepper's first."""
        return [self._digest(key, version) for version in self._keys]

    def _digest(self, key: str, version: int) -> Digest:
        return Digest(version, hmac.digest(self._keys[version], key.encode(), hashlib.sha256).hex())


def record_name(digest_hex: str) -> str:
    """Redis: the cached record of a key (JSON), TTL CACHE_TTL_S, found before its organisation is known."""
    return f"key:{digest_hex}"


def version_name(org_id: str, key_id: str) -> str:
    """Redis: the key's present version, in its organisation's slot. A revoked or changed key has another, or none."""
    return f"{{{org_id}}}:keyver:{key_id}"


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM_CHARS)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, remainder = divmod(number, 62)
        digits.append(_ALPHABET[remainder])
    return "".join(reversed(digits))
