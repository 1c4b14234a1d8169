"""Tokens: access tokens, which the gateway verifies by itself, and refresh tokens, which only auth knows."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from jose import jwt

from services.auth.domain import Account, Session
from services.auth.domain.organizations import OrgRole, scopes_within
from services.auth.errors import CsrfFailed
from services.auth.service.signing import SigningKeys
from shared.access_tokens import ALGORITHM, AUDIENCE, ISSUER, TOKEN_TYPE, csrf_digest
from shared.clock import Clock

REFRESH_PREFIX = "tg_refresh_"
REFRESH_BYTES = 32


class Tokens:
    """Makes tokens. An access token lives `access_ttl_s`."""

    def __init__(self, keys: SigningKeys, secret_key: bytes, clock: Clock, *, access_ttl_s: int) -> None:
        self._keys = keys
        self._csrf_key = hmac.digest(secret_key, b"tollgate csrf tokens", hashlib.sha256)
        self._clock = clock
        self.access_ttl_s = access_ttl_s

    def access(self, account: Account, session: Session) -> str:
        """An ES256 JWT that says who the account is."""
        now = int(self._clock.now().timestamp())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(account.user_id),
            "org": str(account.org_id),
            "sid": str(session.id),
            "ver": session.version,
            "username": account.username,
            "roles": list(account.roles),
            "plan": account.plan,
            "scope": " ".join(scopes_within(OrgRole(account.org_role), account.scopes)),
            "type": TOKEN_TYPE,
            "iat": now,
            "exp": now + self.access_ttl_s,
        }
        if session.browser:
            claims["csrf"] = csrf_digest(self.csrf_token(session))
        key = self._keys.signing()
        token: str = jwt.encode(claims, key.signer, algorithm=ALGORITHM, headers={"kid": key.kid})
        return token

    def csrf_token(self, session: Session) -> str:
        """What a browser's page sends along to show that it is ours: one for each session, kept nowhere."""
        mac = hmac.digest(self._csrf_key, session.id.bytes, hashlib.sha256)
        return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()

    def check_csrf(self, session: Session, csrf_token: str) -> None:
        """Raise CsrfFailed unless it is the session's."""
        if not hmac.compare_digest(self.csrf_token(session).encode(), csrf_token.encode()):
            raise CsrfFailed()


def new_refresh_token() -> str:
    """256 random bits: as with API keys, a plain hash is enough at rest."""
    return REFRESH_PREFIX + secrets.token_urlsafe(REFRESH_BYTES)


def digest(refresh_token: str) -> str:
    return hashlib.sha256(refresh_token.encode()).hexdigest()
