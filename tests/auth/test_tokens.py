"""Access tokens and the keys that sign them."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jose import jwk, jwt
from jose.exceptions import JWTError
from pydantic import SecretStr

from services.auth.errors import SigningKeyUnreadable
from tests.auth.harness import Auth, migrate, running
from tests.conftest import Components, FreshDatabase


def encode(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def foreign_pem() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


async def jwks(auth: Auth) -> dict[str, Any]:
    answer = await auth.http.get("/.well-known/jwks.json")
    assert answer.status_code == 200
    assert "max-age" in answer.headers["cache-control"]
    keys: dict[str, Any] = answer.json()
    return keys


async def test_an_access_token_says_who_it_is_and_verifies_by_the_jwks(auth: Auth) -> None:
    user = await auth.user("operator")
    keys = await jwks(auth)
    claims = auth.claims(user.access_token, keys)
    session_id = claims.pop("sid")
    now = int(auth.clock.now().timestamp())
    assert claims == {
        "iss": "tollgate",
        "aud": "tollgate",
        "sub": user.id,
        "org": user.org_id,
        "ver": 1,
        "username": user.username,
        "roles": ["operator", "user"],
        "plan": "default",
        "scope": "admin billing:read billing:write chat inference keys:read keys:write models",
        "type": "access",
        "iat": now,
        "exp": now + 900,
    }
    sessions = (await auth.call("GET", "/api/v1/auth/sessions", token=user.access_token)).json()["data"]
    assert [s["id"] for s in sessions] == [session_id]
    header = jwt.get_unverified_header(user.access_token)
    assert (header["alg"], header["kid"]) == ("ES256", keys["keys"][0]["kid"])


async def test_the_jwks_shows_public_halves_only(auth: Auth) -> None:
    for key in (await jwks(auth))["keys"]:
        assert set(key) == {"kty", "crv", "x", "y", "alg", "use", "kid"}
        assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("EC", "P-256", "ES256", "sig")


async def test_forged_tokens_do_not_verify_by_the_jwks(auth: Auth) -> None:
    user = await auth.user()
    keys = await jwks(auth)
    header, payload, signature = user.access_token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    kid = jwt.get_unverified_header(user.access_token)["kid"]
    public_pem = jwk.construct(keys["keys"][0], "ES256").to_pem()

    signed = f"{encode({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{payload}"
    confused = hmac.new(public_pem, signed.encode(), hashlib.sha256).digest()
    foreign = jwk.construct(foreign_pem(), "ES256")
    forged = {
        "none": f"{encode({'alg': 'none', 'kid': kid})}.{payload}.",
        "signature dropped": f"{header}.{payload}.",
        "public key as HMAC secret": f"{signed}.{base64.urlsafe_b64encode(confused).rstrip(b'=').decode()}",
        "other key, our kid": jwt.encode(claims, foreign, "ES256", headers={"kid": kid}),
        "kid that is a path": jwt.encode(claims, foreign, "ES256", headers={"kid": "../../dev/null"}),
        "own key in the header": jwt.encode(
            claims, foreign, "ES256", headers={"kid": kid, "jwk": foreign.public_key().to_dict()}
        ),
        "claims changed": f"{header}.{encode({**claims, 'roles': ['admin']})}.{signature}",
    }
    for token in forged.values():
        with pytest.raises(JWTError):
            auth.claims(token, keys)
    with pytest.raises(JWTError):
        jwt.decode(user.access_token, keys, algorithms=["ES256"], audience="somebody-else")


async def test_an_access_token_expires(auth: Auth) -> None:
    user = await auth.user()
    claims = jwt.get_unverified_claims(user.access_token)
    assert claims["exp"] - claims["iat"] == 900
    assert claims["iat"] <= time.time() + 600


@pytest.fixture(scope="module")
def unstarted_url(fresh_database: FreshDatabase) -> str:
    """A migrated database on which auth never ran: it has no signing key yet."""
    return fresh_database("auth", migrate=migrate)


async def test_replicas_that_start_at_once_share_one_signing_key(unstarted_url: str, components: Components) -> None:
    async def kids() -> list[str]:
        async with running(unstarted_url, components.redis_url) as auth:
            return [key["kid"] for key in (await jwks(auth))["keys"]]

    found = await asyncio.gather(*(kids() for _ in range(4)))
    assert len(found[0]) == 1
    assert all(kids == found[0] for kids in found)


async def test_the_private_key_is_encrypted_at_rest_and_opens_with_the_right_secret_only(
    auth: Auth, components: Components
) -> None:
    async with auth.connect() as connection:
        sealed = await connection.fetchval("SELECT private_key FROM auth.signing_key")
    assert b"PRIVATE" not in sealed
    wrong = SecretStr(base64.b64encode(b"w" * 32).decode())
    with pytest.raises(SigningKeyUnreadable, match="TOLLGATE_AUTH_SECRET_KEY"):
        async with running(auth.owner_url, components.redis_url, auth_secret_key=wrong):
            pass
