"""The keys that sign access tokens, encrypted."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import insert, or_, select, text, update

from services.auth.tables import SigningKeyRow
from shared.database import AsyncSession

LOCK_ID = 0x7011_6A7F


class SigningKeyRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def lock(self) -> None:
        """Until the transaction ends, no other replica makes or retires a signing key."""
        await self._session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})

    async def published(self, now: datetime) -> list[SigningKeyRow]:
        """Those that are not retired, newest first."""
        rows = await self._session.scalars(
            select(SigningKeyRow)
            .where(or_(SigningKeyRow.retired_at.is_(None), SigningKeyRow.retired_at > now))
            .order_by(SigningKeyRow.signs_from.desc(), SigningKeyRow.kid)
            .execution_options(populate_existing=True)
        )
        return list(rows)

    async def add(
        self, kid: str, public_jwk: dict[str, Any], private_key: bytes, *, now: datetime, signs_from: datetime
    ) -> None:
        await self._session.execute(
            insert(SigningKeyRow).values(
                kid=kid, public_jwk=public_jwk, private_key=private_key, created_at=now, signs_from=signs_from
            )
        )

    async def retire_others(self, kid: str, at: datetime) -> None:
        """All keys but one retire at a time, those that would sooner excepted."""
        await self._session.execute(
            update(SigningKeyRow)
            .where(SigningKeyRow.kid != kid, or_(SigningKeyRow.retired_at.is_(None), SigningKeyRow.retired_at > at))
            .values(retired_at=at)
        )
