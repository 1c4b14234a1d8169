"""The key that signs access tokens: made once for all replicas, kept encrypted, published as a JWKS."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jose import jwk
from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.errors import SigningKeyUnreadable
from services.auth.repository.signing import SigningKeyRepository
from shared.clock import Clock
from shared.database import AsyncSession

ALGORITHM = "ES256"
NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class SigningKey:
    """The newest key, which signs, and the public halves of all that still verify. `repr` shows no secret."""

    kid: str
    signer: jwk.Key
    public_jwks: tuple[dict[str, Any], ...]


async def load_or_create(sessions: async_sessionmaker[AsyncSession], secret_key: bytes, clock: Clock) -> SigningKey:
    """The signing key of this installation; the first replica to start makes it. Raises SigningKeyUnreadable."""
    async with sessions.begin() as session:
        repository = SigningKeyRepository(session)
        await repository.lock()
        if not await repository.active():
            kid, public_jwk, private_pem = _generate()
            await repository.add(kid, public_jwk, _seal(secret_key, kid, private_pem), clock.now())
        rows = await repository.active()
    newest = rows[0]
    private_pem = _open(secret_key, newest.kid, newest.private_key)
    return SigningKey(newest.kid, jwk.construct(private_pem, ALGORITHM), tuple(row.public_jwk for row in rows))


def _generate() -> tuple[str, dict[str, Any], bytes]:
    private = ec.generate_private_key(ec.SECP256R1())
    private_pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    kid = secrets.token_hex(8)
    public_jwk = {**jwk.construct(public_pem, ALGORITHM).to_dict(), "use": "sig", "kid": kid}
    return kid, public_jwk, private_pem


def _seal(secret_key: bytes, kid: str, private_pem: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(secret_key).encrypt(nonce, private_pem, kid.encode())


def _open(secret_key: bytes, kid: str, sealed: bytes) -> bytes:
    try:
        return AESGCM(secret_key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], kid.encode())
    except InvalidTag as e:
        raise SigningKeyUnreadable(detail=f"kid {kid}") from e
