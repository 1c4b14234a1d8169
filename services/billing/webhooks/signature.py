"""Secrets and signatures of webhooks: https://github.com/standard-webhooks/standard-webhooks, symmetric (`v1`).

An endpoint's secret is derived from a key of the service and never stored: who reads the database learns none.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from shared.identity import parse_key_ring

SECRET_PREFIX = "whsec_"  # noqa: S105 - the specification's, not a secret


@dataclass(frozen=True, slots=True)
class SecretName:
    """Which secret: of which endpoint, by which key of the service, and the how manieth."""

    endpoint_id: UUID
    kid: str
    version: int


class SecretRing:
    """Derives secrets from the setting `kid:base64[,…]`: new endpoints get the first key, old ones keep theirs."""

    def __init__(self, setting: str) -> None:
        self._keys = parse_key_ring(setting)
        self.current = next(iter(self._keys))

    def secret(self, name: SecretName) -> bytes:
        """256 bits. Raises KeyError when the key is not in the ring any more."""
        message = f"webhook:{name.endpoint_id}:{name.version}".encode()
        return hmac.digest(self._keys[name.kid], message, hashlib.sha256)

    def printed(self, name: SecretName) -> str:
        """As customers keep it."""
        return SECRET_PREFIX + base64.b64encode(self.secret(name)).decode()


def headers(secrets: Sequence[bytes], message_id: str, unix_s: int, body: str) -> dict[str, str]:
    """The three headers; one signature for each secret that is in force."""
    signed = f"{message_id}.{unix_s}.{body}".encode()
    signatures = (base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(unix_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
