"""Access tokens: what auth puts into them and the gateway asks of them. JWT (RFC 7519), signed with ES256.

    header   alg ES256, kid (a key of the JWKS at JWKS_PATH)
    claims   iss, aud, sub (user), org, sid (session), ver (the session's version), username, roles, plan,
             scope (RFC 9068: separated by blanks), type "access", iat, exp; for browsers, csrf

Neither side accepts another algorithm, and a claim that is missing is a token refused.

A token stands only with the present version of its session, which the gateway finds under `version_name` in Redis, or
else in auth's view: so sign-outs, disabled accounts and changed roles do not wait for tokens to expire.
"""

from __future__ import annotations

ALGORITHM = "ES256"
ISSUER = "tollgate"
AUDIENCE = "tollgate"
TOKEN_TYPE = "access"  # noqa: S105 - the name of a type
JWKS_PATH = "/.well-known/jwks.json"


def version_name(org_id: str, session_id: str) -> str:
    """Redis: a session's present version, in its organisation's slot, TTL as for keys (apikeys.CACHE_TTL_S)."""
    return f"{{{org_id}}}:sesver:{session_id}"
