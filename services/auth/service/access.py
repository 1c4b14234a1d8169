"""Who acts: the gateway's word for who asks, checked against what the database says of them now."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Account, Actor, Origin, UserStatus
from services.auth.domain.organizations import OrgRole, scopes_within
from services.auth.errors import OrganizationNotFound, SessionEnded
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

    async def resolve(self, identity: Identity, origin: Origin, org_id: UUID | None = None) -> Actor:
        """The actor behind an identity, with present roles and scopes, in the organisation that the identity names.

        A person may ask for another one of theirs: OrganizationNotFound for others. A key is in one for good.
        Raises Unauthenticated, SessionEnded.

        A person has the scopes of their roles, but for what a plain member may not do in an organisation; a key has its
        own, and its owner's roles (which need `admin`).
        """
        try:
            user_id, home_id = UUID(identity.user_id), UUID(identity.org_id)
        except ValueError as e:
            raise Unauthenticated(detail="identity without user and organisation") from e
        async with self._sessions() as session:
            account = await AccountRepository(session).find(user_id, home_id)
            if account is None or account.status is not UserStatus.ACTIVE:
                raise Unauthenticated(detail="account disabled or gone")
            if identity.kind == "user":
                await self._require_session(SessionRepository(session), identity, account)
            if org_id is not None and org_id != account.org_id:
                account = await AccountRepository(session).find(user_id, org_id) if identity.kind == "user" else None
                if account is None:
                    raise OrganizationNotFound(param="organization_id")
        role = OrgRole(account.org_role)
        scopes = scopes_within(role, account.scopes) if identity.kind == "user" else identity.scopes
        resolved = replace(identity, org_id=str(account.org_id), roles=account.roles, scopes=scopes, plan=account.plan)
        return Actor(resolved, origin, role)

    async def _require_session(self, sessions: SessionRepository, identity: Identity, account: Account) -> None:
        try:
            found = await sessions.find(UUID(identity.session_id), account.user_id)
        except ValueError as e:
            raise SessionEnded(detail="identity without session") from e
        if found is None or found.revoked_at is not None or found.expires_at <= self._clock.now():
            raise SessionEnded()
