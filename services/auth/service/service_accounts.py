"""Service accounts of an organisation, which its owners and admins keep."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Actor, audit_entry
from services.auth.domain.organizations import OrgRole, ServiceAccount, check_may_manage
from services.auth.errors import TooManyServiceAccounts
from services.auth.repository import audit
from services.auth.repository.keys import KeyRepository
from services.auth.repository.organizations import OrganizationRepository
from services.auth.repository.service_accounts import ServiceAccountRepository
from services.auth.service.outbox import Outbox
from services.auth.service.sessions import require_person
from shared import ids
from shared.clock import Clock
from shared.database import AsyncSession


class ServiceAccounts:
    """For people only; as in Organizations, strangers get a 404."""

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], outbox: Outbox, clock: Clock, *, per_org_max: int
    ) -> None:
        self._sessions = sessions
        self._outbox = outbox
        self._clock = clock
        self._per_org_max = per_org_max

    async def create(self, actor: Actor, org_id: UUID, name: str) -> ServiceAccount:
        """Raises OrganizationNotFound, NotAllowedInOrganization, TooManyServiceAccounts."""
        now = self._clock.now()
        made = ServiceAccount(ids.service_account_id(), name, now)
        async with self._sessions.begin() as session:
            await self._require_manager(session, actor, org_id)
            repository = ServiceAccountRepository(session, tenant=org_id)
            if len(await repository.all()) >= self._per_org_max:
                raise TooManyServiceAccounts()
            await repository.add(made)
            entry = audit_entry(actor, "service_account.created", "user", made.id, org_id, after={"name": name})
            await audit.append(session, entry, now)
        return made

    async def list(self, actor: Actor, org_id: UUID) -> list[ServiceAccount]:
        """Raises OrganizationNotFound."""
        require_person(actor)
        async with self._sessions() as session:
            await OrganizationRepository(session, tenant=org_id).get(actor.user_id)
            return await ServiceAccountRepository(session, tenant=org_id).all()

    async def remove(self, actor: Actor, org_id: UUID, account_id: UUID) -> None:
        """For good, with its keys. Raises OrganizationNotFound, NotAllowedInOrganization, ServiceAccountNotFound."""
        now = self._clock.now()
        async with self._sessions.begin() as session:
            await self._require_manager(session, actor, org_id)
            repository = ServiceAccountRepository(session, tenant=org_id)
            account = await repository.lock(account_id)
            await repository.disable(account_id, now)
            events = await KeyRepository(session, tenant=org_id, owner=account_id).revoke_all(now)
            entry = audit_entry(
                actor,
                "service_account.removed",
                "user",
                account_id,
                org_id,
                before={"name": account.name},
                after=None,
                keys_revoked=len(events),
            )
            await audit.append(session, entry, now)
        await self._outbox.deliver(events)

    @staticmethod
    async def _require_manager(session: AsyncSession, actor: Actor, org_id: UUID) -> None:
        require_person(actor)
        repository = OrganizationRepository(session, tenant=org_id)
        await repository.lock()
        check_may_manage((await repository.get(actor.user_id)).role, OrgRole.MEMBER)
