"""Many keys at once, and keys that somebody found where they should not be."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import OPERATORS, Actor, AuditEntry, KeyEvent, KeyStatus, Origin
from services.auth.domain.organizations import OrgRole, check_may_manage
from services.auth.errors import OrganizationNotFound, UserNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.keys import KeyRepository
from services.auth.repository.organizations import OrganizationRepository
from services.auth.service.outbox import Outbox
from shared import apikeys
from shared.apikeys import Peppers
from shared.clock import Clock
from shared.database import AsyncSession
from shared.telemetry import AuthMetrics


class Revocations:
    """Every method tells gateways before it answers, as the revocation of one key does."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        peppers: Peppers,
        outbox: Outbox,
        clock: Clock,
        metrics: AuthMetrics,
    ) -> None:
        self._sessions = sessions
        self._peppers = peppers
        self._outbox = outbox
        self._clock = clock
        self._metrics = metrics

    async def in_organization(self, actor: Actor, user_id: UUID | None) -> int:
        """Revoke the keys of one member of the actor's organisation, or of all (None); how many were active.

        A member may do so to their own. Raises NotAllowedInOrganization, MemberNotFound.
        """
        actor.identity.require_scope("keys:write")
        async with self._sessions.begin() as session:
            if user_id != actor.user_id:
                check_may_manage(actor.org_role, OrgRole.MEMBER)
                if user_id is not None:
                    await OrganizationRepository(session, tenant=actor.org_id).member(user_id)
            repository = KeyRepository(session, tenant=actor.org_id, owner=user_id)
            events = await self._revoke_all(session, actor, repository, user_id, actor.org_id)
        return await self._announce(events)

    async def of_user(self, actor: Actor, user_id: UUID) -> int:
        """For operators: a user's keys in every organisation; how many were active. Raises UserNotFound."""
        actor.identity.require_role(*OPERATORS)
        async with self._sessions.begin() as session:
            if await AccountRepository(session).lock_user(user_id) is None:
                raise UserNotFound()
            repository = KeyRepository(session, tenant=None, owner=user_id)
            events = await self._revoke_all(session, actor, repository, user_id, None)
        return await self._announce(events)

    async def of_organization(self, actor: Actor, org_id: UUID) -> int:
        """For operators: an organisation's keys; how many were active. Raises OrganizationNotFound."""
        actor.identity.require_role(*OPERATORS)
        async with self._sessions.begin() as session:
            if not await OrganizationRepository(session, tenant=org_id).lock():
                raise OrganizationNotFound()
            repository = KeyRepository(session, tenant=org_id)
            events = await self._revoke_all(session, actor, repository, None, org_id)
        return await self._announce(events)

    async def leaked(self, secret: str, origin: Origin) -> None:
        """Revoke the key that a secret belongs to, if it is one of ours. Whoever has it may: nobody hears whether."""
        if not apikeys.is_well_formed(secret):
            return
        digests = [digest.hex for digest in self._peppers.candidates(secret)]
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = KeyRepository(session, tenant=None)
            key = await repository.lock_by_digest(digests)
            if key is None or key.status is KeyStatus.REVOKED:
                return
            events = await repository.revoke([key.id], now)
            entry = AuditEntry(
                action="key.leaked",
                target_type="api_key",
                target_id=key.id,
                actor_user_id=None,
                actor_key_id=None,
                org_id=key.org_id,
                origin=origin,
                details={"before": key.state_at(now), "after": KeyStatus.REVOKED.value},
            )
            await audit.append(session, entry, now)
        await self._announce(events)

    async def _revoke_all(
        self, session: AsyncSession, actor: Actor, repository: KeyRepository, user_id: UUID | None, org_id: UUID | None
    ) -> list[KeyEvent]:
        now = self._clock.now()
        events = await repository.revoke_all(now)
        target, target_id = ("user", user_id) if user_id is not None else ("organization", org_id)
        keys = [str(event.key_id) for event in events]
        entry = AuditEntry(
            action="keys.revoked",
            target_type=target,
            target_id=target_id,
            actor_user_id=actor.user_id,
            actor_key_id=actor.key_id,
            org_id=org_id,
            origin=actor.origin,
            details={"before": KeyStatus.ACTIVE.value, "after": KeyStatus.REVOKED.value, "keys": keys},
        )
        await audit.append(session, entry, now)
        return events

    async def _announce(self, events: list[KeyEvent]) -> int:
        self._metrics.keys.labels("revoked").inc(len(events))
        await self._outbox.deliver(events)
        return len(events)
