"""The keys that sign access tokens: shared by all replicas, kept encrypted, published as a JWKS, rotated.

    made ──lead_s──► signs ────────── until the next one signs ──► verifies for one token's lifetime more ──► retired

A new key is published `lead_s` before its first signature, so that every replica and every gateway knows it by then;
the one before it is published until the last token that it signed is over. So a rotation logs nobody out. Replicas
learn of it by reading the table every few seconds; one that cannot goes on with what it knows.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jose import jwk
from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import AuditEntry, Origin
from services.auth.errors import SigningKeyUnreadable
from services.auth.repository import audit
from services.auth.repository.signing import SigningKeyRepository
from services.auth.tables import SigningKeyRow
from shared.access_tokens import ALGORITHM
from shared.clock import Clock
from shared.database import AsyncSession

NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs from `signs_from` on, until a later one does. `repr` shows no secret."""

    kid: str
    signs_from: datetime
    retires_at: datetime | None
    signer: jwk.Key
    public_jwk: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RotationLimits:
    """`every_s`: the age at which a key is replaced (0: only when told). `lead_s`: how long a key is published before
    it signs. `verify_s`: how long the one before is published afterwards; not less than a token's lifetime.
    """

    every_s: int
    lead_s: int
    verify_s: int


class SigningKeys:
    """Call `load` once before anything else, then `refresh` every few seconds."""

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], secret_key: bytes, clock: Clock, limits: RotationLimits
    ) -> None:
        self._sessions = sessions
        self._secret_key = secret_key
        self._clock = clock
        self._limits = limits
        self._keys: tuple[SigningKey, ...] = ()

    async def load(self) -> None:
        """Read the keys; the first replica of an installation makes one. Raises SigningKeyUnreadable."""
        async with self._sessions.begin() as session:
            repository = SigningKeyRepository(session)
            await repository.lock()
            rows = await repository.published(self._clock.now())
            if not rows:
                await self._add(repository, self._clock.now())
                rows = await repository.published(self._clock.now())
        self._keys = self._opened(rows)

    async def refresh(self) -> None:
        """Read the keys again, and rotate when the newest is old enough. Raises SigningKeyUnreadable."""
        async with self._sessions() as session:
            rows = await SigningKeyRepository(session).published(self._clock.now())
        if rows and self._is_due(rows[0]):
            await self.rotate(only_if_due=True)
            return
        self._keys = self._opened(rows)

    async def rotate(self, *, at_once: bool = False, only_if_due: bool = False) -> str:
        """Make a key that takes over after the lead; its kid. Nobody is logged out.

        `at_once` is for a key that somebody may have copied: the new one signs now, and tokens of the others are
        refused as soon as gateways have fetched the set; their clients refresh. `only_if_due` does nothing where
        another replica was quicker.
        """
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = SigningKeyRepository(session)
            await repository.lock()
            rows = await repository.published(now)
            if only_if_due and rows and not self._is_due(rows[0]):
                kid = rows[0].kid
            else:
                signs_from = now if at_once else now + timedelta(seconds=self._limits.lead_s)
                kid = await self._add(repository, signs_from)
                keep_until = now if at_once else signs_from + timedelta(seconds=self._limits.verify_s)
                await repository.retire_others(kid, keep_until)
                await audit.append(session, _rotated(kid, at_once), now)
            rows = await repository.published(now)
        self._keys = self._opened(rows)
        return kid

    def signing(self) -> SigningKey:
        """The key that signs now."""
        now = self._clock.now()
        begun = [key for key in self._keys if key.signs_from <= now]
        return begun[0] if begun else self._keys[-1]

    def published(self) -> list[SigningKey]:
        """The keys that verify now or soon will, newest first."""
        now = self._clock.now()
        return [key for key in self._keys if key.retires_at is None or key.retires_at > now]

    def jwks(self) -> dict[str, Any]:
        """The public halves (RFC 7517), by which anyone may verify access tokens."""
        return {"keys": [key.public_jwk for key in self.published()]}

    def _is_due(self, newest: SigningKeyRow) -> bool:
        every_s = self._limits.every_s
        return every_s > 0 and newest.signs_from + timedelta(seconds=every_s) <= self._clock.now()

    async def _add(self, repository: SigningKeyRepository, signs_from: datetime) -> str:
        kid, public_jwk, private_pem = _generate()
        sealed = _seal(self._secret_key, kid, private_pem)
        await repository.add(kid, public_jwk, sealed, now=self._clock.now(), signs_from=signs_from)
        return kid

    def _opened(self, rows: list[SigningKeyRow]) -> tuple[SigningKey, ...]:
        known = {key.kid: key for key in self._keys}
        return tuple(
            SigningKey(
                row.kid,
                row.signs_from,
                row.retired_at,
                known[row.kid].signer if row.kid in known else self._signer(row),
                row.public_jwk,
            )
            for row in rows
        )

    def _signer(self, row: SigningKeyRow) -> jwk.Key:
        return jwk.construct(_open(self._secret_key, row.kid, row.private_key), ALGORITHM)


def _rotated(kid: str, at_once: bool) -> AuditEntry:
    details: dict[str, object] = {"kid": kid, "at_once": at_once}
    return AuditEntry("signing_key.rotated", "signing_key", None, None, None, None, Origin(), details)


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
