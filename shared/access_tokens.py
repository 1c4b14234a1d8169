"""Access tokens: what auth puts into them and the gateway asks of them. JWT (RFC 7519), signed with ES256.

    header   alg ES256, kid (a key of the JWKS at JWKS_PATH)
    claims   iss, aud, sub (user), org, sid (session), ver (the session's version), username, roles, plan,
             scope (RFC 9068: separated by blanks), type "access", iat, exp; for browsers, csrf

Neither side accepts another algorithm, and a claim that is missing is a token refused.
"""

from __future__ import annotations

ALGORITHM = "ES256"
ISSUER = "tollgate"
AUDIENCE = "tollgate"
TOKEN_TYPE = "access"  # noqa: S105 - the name of a type
JWKS_PATH = "/.well-known/jwks.json"
