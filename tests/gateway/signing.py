"""Access tokens as auth signs them, by a key of the test's own."""

import json
import time
from typing import Any
from uuid import uuid4

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jose import jwk, jwt

from tests.gateway.harness import answer


class Tokens:
    """A signing key of auth's kind, and its JWKS."""

    def __init__(self, session: dict[str, str] | None = None) -> None:
        """`session` is what tokens speak for, unless a test says otherwise."""
        self._session = session or {name: str(uuid4()) for name in ("sub", "org", "sid")}
        private = ec.generate_private_key(ec.SECP256R1())
        self.pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.kid = uuid4().hex
        self.jwk = {**jwk.construct(public.decode(), "ES256").to_dict(), "kid": self.kid, "use": "sig"}

    def sign(self, *, kid: str | None = None, algorithm: str = "ES256", key: str | None = None, **changes: Any) -> str:
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": "tollgate",
            "aud": "tollgate",
            **self._session,
            "ver": 1,
            "username": "somebody",
            "roles": ["user"],
            "plan": "default",
            "scope": "chat models inference billing:read billing:write keys:read keys:write",
            "type": "access",
            "iat": now,
            "exp": now + 900,
        } | changes
        if {"operator", "admin"} & set(claims["roles"] or ()) and "scope" not in changes:
            claims["scope"] += " admin"
        claims = {k: v for k, v in claims.items() if v is not None}
        token: str = jwt.encode(claims, key or self.pem, algorithm=algorithm, headers={"kid": kid or self.kid})
        return token

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        """The handler of /.well-known/jwks.json."""
        await answer(send, 200, json.dumps({"keys": [self.jwk]}).encode())
