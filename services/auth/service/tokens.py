"""Tokens: access tokens, which the gateway verifies by itself, and refresh tokens, which only auth knows."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any
from uuid import UUID

from jose import jwt

from services.auth.domain import Account
from services.auth.service.signing import ALGORITHM, SigningKey
from shared.clock import Clock

ISSUER = "tollgate"
AUDIENCE = "tollgate"
REFRESH_PREFIX = "tg_refresh_"
REFRESH_BYTES = 32


class Tokens:
    """Makes tokens. An access token lives `access_ttl_s` and cannot be called back; a session can."""

    def __init__(self, key: SigningKey, clock: Clock, *, access_ttl_s: int) -> None:
        self._key = key
        self._clock = clock
        self.access_ttl_s = access_ttl_s

    def access(self, account: Account, session_id: UUID) -> str:
        """An ES256 JWT that says who the account is."""
        now = int(self._clock.now().timestamp())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(account.user_id),
            "org": str(account.org_id),
            "sid": str(session_id),
            "username": account.username,
            "roles": list(account.roles),
            "plan": account.plan,
            "type": "access",
            "iat": now,
            "exp": now + self.access_ttl_s,
        }
        token: str = jwt.encode(claims, self._key.signer, algorithm=ALGORITHM, headers={"kid": self._key.kid})
        return token

    def jwks(self) -> dict[str, Any]:
        """The public keys (RFC 7517) by which anyone may verify access tokens."""
        return {"keys": list(self._key.public_jwks)}


def new_refresh_token() -> str:
    """256 random bits: as with API keys, a plain hash is enough at rest."""
    return REFRESH_PREFIX + secrets.token_urlsafe(REFRESH_BYTES)


def digest(refresh_token: str) -> str:
    return hashlib.sha256(refresh_token.encode()).hexdigest()
