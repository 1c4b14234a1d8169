"""What operators do to other people's objects. Every act is audited with its before and after."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import (
    OPERATORS,
    Actor,
    ApiKey,
    AuditFilter,
    AuditLine,
    Event,
    Page,
    UserStatus,
    UserSummary,
    audit_entry,
    merge_limits,
    page_of,
)
from services.auth.errors import KeyNotActive, UserNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository, page_of_users
from services.auth.repository.keys import KeyRepository
from services.auth.repository.sessions import SessionRepository
from services.auth.service.keys import Keys
from services.auth.service.outbox import Outbox
from shared.clock import Clock
from shared.database import AsyncSession
from shared.errors import PermissionDenied


class Admin:
    """Needs the role operator or admin; only an admin touches operators and admins."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], keys: Keys, outbox: Outbox, clock: Clock) -> None:
        self._sessions = sessions
        self._keys = keys
        self._outbox = outbox
        self._clock = clock

    async def set_key_limits(self, actor: Actor, key_id: UUID, limits: Mapping[str, int | None] | None) -> ApiKey:
        """Set a key's own limits, above its plan's if need be. Raises KeyNotFound, KeyNotActive."""
        actor.identity.require_role(*OPERATORS)
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = KeyRepository(session, tenant=None)
            key = await repository.lock(key_id)
            if key.state_at(now) != "active":
                raise KeyNotActive()
            merged = merge_limits(key.overrides, limits, key.plan_limits, may_raise=True)
            events = await repository.change(key_id, limits=merged)
            entry = audit_entry(
                actor, "key.limits_set", "api_key", key_id, key.org_id, before=dict(key.overrides), after=merged
            )
            await audit.append(session, entry, now)
            changed = await repository.get(key_id)
        await self._outbox.deliver(events)
        return changed

    async def audit_page(
        self, actor: Actor, wanted: AuditFilter, *, before: UUID | None, limit: int
    ) -> Page[AuditLine]:
        """The audit log of the installation, newest first."""
        actor.identity.require_role(*OPERATORS)
        async with self._sessions() as session:
            lines = await audit.page(session, wanted, before=before, limit=limit + 1)
        return page_of(lines, limit, lambda line: line.id)

    async def users(self, actor: Actor, *, search: str, before: UUID | None, limit: int) -> Page[UserSummary]:
        """Everybody, newest first; or those whose user name (with an `@`: whose address) begins with `search`."""
        actor.identity.require_role(*OPERATORS)
        async with self._sessions() as session:
            users = await page_of_users(session, search=search, before=before, limit=limit + 1)
        return page_of(users, limit, lambda user: user.id)

    async def revoke_key(self, actor: Actor, key_id: UUID) -> ApiKey:
        """Revoke any organisation's key. Raises KeyNotFound."""
        actor.identity.require_role(*OPERATORS)
        return await self._keys.revoke_of(actor, key_id, tenant=None, owner=None)

    async def set_user_status(self, actor: Actor, user_id: UUID, status: UserStatus) -> UserStatus:
        """Disable a user, with all sessions and keys, or enable them again (the keys work again, sessions do not).

        Raises UserNotFound; PermissionDenied for oneself, and for an operator's act upon operators.
        """
        actor.identity.require_role(*OPERATORS)
        if user_id == actor.user_id:
            raise PermissionDenied("Nobody changes their own status.", code="own_status")
        now = self._clock.now()
        async with self._sessions.begin() as session:
            accounts = AccountRepository(session)
            found = await accounts.lock_user(user_id)
            if found is None:
                raise UserNotFound()
            before, roles = found
            if set(roles) & set(OPERATORS):
                actor.identity.require_role("admin")
            if before is status:
                return status
            await accounts.set_status(user_id, status, now)
            events: list[Event] = [*await KeyRepository(session, tenant=None).owner_changed(user_id)]
            if status is UserStatus.DISABLED:
                events += await SessionRepository(session).revoke_all(user_id, now, "user_disabled")
            entry = audit_entry(
                actor, "user.status_set", "user", user_id, actor.org_id, before=before.value, after=status.value
            )
            await audit.append(session, entry, now)
        await self._outbox.deliver(events)
        return status
