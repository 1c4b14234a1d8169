"""Who acts: the gateway's word for who asks, checked against what the database says of them now."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Account, Actor, Origin, UserStatus
from services.auth.errors import SessionEnded
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.sessions import SessionRepository
from shared.clock import Clock
from shared.database import AsyncSession
from shared.errors import Unauthenticated
from shared.identity import Identity


class Access:
    """An access token outlives a logout by its lifetime everywhere else; at auth's own addresses it does not."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], clock: Clock) -> None:
        self._sessions = sessions
        self._clock = clock

    async def resolve(self, identity: Identity, origin: Origin) -> Actor:
        """The actor behind an identity, with present roles and scopes. Raises Unauthenticated, SessionEnded.

        A person has the scopes of their roles; a key has its own, and its owner's roles (which need `admin`).
        """
        try:
            user_id, org_id = UUID(identity.user_id), UUID(identity.org_id)
        except ValueError as e:
            raise Unauthenticated(detail="identity without user and organisation") from e
        async with self._sessions() as session:
            account = await AccountRepository(session).find(user_id, org_id)
            if account is None or account.status is not UserStatus.ACTIVE:
                raise Unauthenticated(detail="account disabled or gone")
            if identity.kind == "user":
                await self._require_session(SessionRepository(session), identity, account)
        scopes = account.scopes if identity.kind == "user" else identity.scopes
        return Actor(replace(identity, roles=account.roles, scopes=scopes, plan=account.plan), origin)

    async def _require_session(self, sessions: SessionRepository, identity: Identity, account: Account) -> None:
        try:
            found = await sessions.find(UUID(identity.session_id), account.user_id)
        except ValueError as e:
            raise SessionEnded(detail="identity without session") from e
        if found is None or found.revoked_at is not None or found.expires_at <= self._clock.now():
            raise SessionEnded()
