"""The keys that sign access tokens, encrypted."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, text

from services.auth.tables import SigningKeyRow
from shared.database import AsyncSession

LOCK_ID = 0x7011_6A7F


class SigningKeyRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def lock(self) -> None:
        """Until the transaction ends, no other replica makes a signing key."""
        await self._session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})

    async def active(self) -> list[SigningKeyRow]:
        """Those that are not retired, newest first."""
        rows = await self._session.scalars(
            select(SigningKeyRow)
            .where(SigningKeyRow.retired_at.is_(None))
            .order_by(SigningKeyRow.created_at.desc(), SigningKeyRow.kid)
        )
        return list(rows)

    async def add(self, kid: str, public_jwk: dict[str, Any], private_key: bytes, now: datetime) -> None:
        await self._session.execute(
            insert(SigningKeyRow).values(kid=kid, public_jwk=public_jwk, private_key=private_key, created_at=now)
        )
