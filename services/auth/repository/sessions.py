"""Sessions and their refresh tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Update, delete, insert, select, update

from services.auth.domain import Session, SessionEvent
from services.auth.tables import RefreshTokenRow, SessionOutboxRow, SessionRow
from shared.database import AsyncSession


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A refresh token at rest, with its session."""

    session: Session
    expires_at: datetime
    used_at: datetime | None


class SessionRepository:
    """Every look-up for a person names the person: a session of somebody else is not there."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add_token(self, session_id: UUID, digest: str, *, now: datetime, expires_at: datetime) -> None:
        await self._session.execute(
            insert(RefreshTokenRow).values(digest=digest, session_id=session_id, created_at=now, expires_at=expires_at)
        )

    async def lock_token(self, digest: str) -> StoredToken | None:
        """A refresh token with its session, both locked: of two that come with the same token, one sees it used."""
        statement = (
            select(RefreshTokenRow, SessionRow)
            .join(SessionRow, SessionRow.id == RefreshTokenRow.session_id)
            .where(RefreshTokenRow.digest == digest)
            .with_for_update()
        )
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            return None
        token, session = row
        return StoredToken(_session(session), token.expires_at, token.used_at)

    async def use_token(self, digest: str, session_id: UUID, now: datetime) -> None:
        await self._session.execute(update(RefreshTokenRow).where(RefreshTokenRow.digest == digest).values(used_at=now))
        await self._session.execute(update(SessionRow).where(SessionRow.id == session_id).values(last_used_at=now))

    async def find(self, session_id: UUID, user_id: UUID) -> Session | None:
        row = await self._session.scalar(
            select(SessionRow).where(SessionRow.id == session_id, SessionRow.user_id == user_id)
        )
        return _session(row) if row else None

    async def live(self, user_id: UUID, now: datetime) -> list[Session]:
        """A person's sessions that are neither revoked nor over, newest first."""
        rows = await self._session.scalars(
            select(SessionRow)
            .where(SessionRow.user_id == user_id, SessionRow.revoked_at.is_(None), SessionRow.expires_at > now)
            .order_by(SessionRow.created_at.desc(), SessionRow.id.desc())
        )
        return [_session(row) for row in rows]

    async def revoke(self, session_ids: list[UUID], now: datetime, reason: str) -> list[SessionEvent]:
        """End sessions; those that are over already keep their time and reason. The events of the others."""
        return await self._apply(
            update(SessionRow)
            .where(SessionRow.id.in_(session_ids), SessionRow.revoked_at.is_(None))
            .values(revoked_at=now, revoked_reason=reason)
        )

    async def revoke_all(
        self, user_id: UUID, now: datetime, reason: str, *, but: UUID | None = None
    ) -> list[SessionEvent]:
        """End a person's sessions, all of them or all but one; the events of those."""
        kept = (SessionRow.id != but,) if but is not None else ()
        return await self._apply(
            update(SessionRow)
            .where(SessionRow.user_id == user_id, SessionRow.revoked_at.is_(None), *kept)
            .values(revoked_at=now, revoked_reason=reason)
        )

    async def owner_changed(self, user_id: UUID, now: datetime, *, org_id: UUID | None = None) -> list[SessionEvent]:
        """What tokens say of a person is wrong now: those of live sessions, in one organisation or all, are over."""
        there = (SessionRow.org_id == org_id,) if org_id is not None else ()
        return await self._apply(
            update(SessionRow).where(
                SessionRow.user_id == user_id, SessionRow.revoked_at.is_(None), SessionRow.expires_at > now, *there
            )
        )

    async def leave_organization(self, session_id: UUID, now: datetime) -> list[SessionEvent]:
        """Tokens of a session are over, as gateways know it: by the organisation that it is in. `enter_organization`
        follows in the same transaction.
        """
        return await self._apply(update(SessionRow).where(SessionRow.id == session_id).values(last_used_at=now))

    async def enter_organization(self, session_id: UUID, org_id: UUID) -> None:
        await self._session.execute(update(SessionRow).where(SessionRow.id == session_id).values(org_id=org_id))

    async def _apply(self, change: Update) -> list[SessionEvent]:
        """The one way in which sessions change: the version grows, and an event stays in the outbox."""
        changed = (
            change.values(version=SessionRow.version + 1)
            .returning(SessionRow.id, SessionRow.org_id, SessionRow.version)
            .cte("changed")
        )
        table = SessionOutboxRow
        recorded = (
            insert(table)
            .from_select(["session_id", "org_id", "version"], select(changed))
            .returning(table.id, table.session_id, table.org_id, table.version)
        )
        return [SessionEvent(*row) for row in await self._session.execute(recorded)]

    async def prune(self, now: datetime, batch_max: int) -> int:
        """Delete sessions that are over, with their tokens; at most `batch_max`. How many went."""
        over = select(SessionRow.id).where(SessionRow.expires_at <= now).order_by(SessionRow.expires_at)
        gone = await self._session.scalars(
            delete(SessionRow).where(SessionRow.id.in_(over.limit(batch_max))).returning(SessionRow.id)
        )
        return len(gone.all())


def _session(row: SessionRow) -> Session:
    return Session(
        id=row.id,
        user_id=row.user_id,
        org_id=row.org_id,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        user_agent=row.user_agent,
        address=str(row.address) if row.address else None,
        version=row.version,
        browser=row.browser,
    )
