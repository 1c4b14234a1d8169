"""Access tokens: what auth puts into them and the gateway asks of them. JWT (RFC 7519), signed with ES256.

    header   alg ES256, kid (a key of the JWKS at JWKS_PATH)
    claims   iss, aud, sub (user), org, sid (session), ver (the session's version), username, roles, plan,
             scope (RFC 9068: separated by blanks), type "access", iat, exp; for browsers, csrf

Neither side accepts another algorithm, and a claim that is missing is a token refused.

A token stands only with the present version of its session, which the gateway finds under `version_name` in Redis, or
else in auth's view: so sign-outs, disabled accounts and changed roles do not wait for tokens to expire.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

ALGORITHM = "ES256"
ISSUER = "tollgate"
AUDIENCE = "tollgate"
TOKEN_TYPE = "access"  # noqa: S105 - the name of a type
JWKS_PATH = "/.well-known/jwks.json"
CSRF_HEADER = "x-csrf-token"


@dataclass(frozen=True, slots=True)
class CookieNames:
    """What a browser's cookies are called."""

    access: str
    refresh: str
    csrf: str


def cookie_names(public_url: str) -> CookieNames:
    """Over HTTPS with `__Host-`, so that no other host of the domain can set them (RFC 6265bis, 4.1.3)."""
    host = "__Host-" if public_url.startswith("https://") else ""
    return CookieNames(f"{host}tg_access", "tg_refresh", f"{host}tg_csrf")


def csrf_digest(csrf_token: str) -> str:
    """The claim `csrf` of the tokens that a browser keeps in a cookie."""
    return base64.urlsafe_b64encode(hashlib.sha256(csrf_token.encode()).digest()).rstrip(b"=").decode()


def version_name(org_id: str, session_id: str) -> str:
    """Redis: a session's present version, in its organisation's slot, TTL as for keys (apikeys.CACHE_TTL_S)."""
    return f"{{{org_id}}}:sesver:{session_id}"
