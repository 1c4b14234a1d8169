"""Organisations: who belongs to them, as what, and how one joins.

An owner may do everything, an admin all but what concerns owners, a member sees who else is there and may leave. Every
change of a membership grows the versions of the member's keys, so that gateways read them again.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import DEFAULT_PLAN, OPERATORS, Actor, audit_entry
from services.auth.domain.organizations import Invitation, Member, Organization, OrgRole, check_may_manage
from services.auth.errors import (
    InvalidInvitation,
    LastOwner,
    OrganizationsByOperators,
    TooManyInvitations,
    TooManyMembers,
    TooManyOrganizations,
)
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.keys import KeyRepository
from services.auth.repository.organizations import (
    OrganizationRepository,
    add_organization,
    organizations_of,
    take_invitation,
)
from services.auth.repository.sessions import SessionRepository
from services.auth.service.outbox import Outbox
from services.auth.service.sessions import require_person
from shared import ids
from shared.clock import Clock
from shared.database import AsyncSession

INVITATION_PREFIX = "tg_invite_"
INVITATION_BYTES = 32


@dataclass(frozen=True, slots=True)
class OrganizationLimits:
    """How many organisations a person belongs to, members and open invitations an organisation has; a default life.

    `self_service`: whether anyone may make organisations, or only operators.
    """

    self_service: bool
    per_user_max: int
    members_max: int
    invitations_max: int
    invitation_ttl_s: int


@dataclass(frozen=True, slots=True)
class NewInvitation:
    """An invitation and, this once, its token, which `repr` does not show."""

    record: Invitation
    token: str = field(repr=False)


class Organizations:
    """For people only; each method reads first what the actor is in the organisation, and 404s for strangers."""

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], outbox: Outbox, clock: Clock, limits: OrganizationLimits
    ) -> None:
        self._sessions = sessions
        self._outbox = outbox
        self._clock = clock
        self._limits = limits

    async def mine(self, actor: Actor) -> list[Organization]:
        """The organisations that the actor belongs to."""
        require_person(actor)
        async with self._sessions() as session:
            return await organizations_of(session, actor.user_id)

    async def create(self, actor: Actor, name: str) -> Organization:
        """A new organisation that the actor owns. Raises OrganizationsByOperators, TooManyOrganizations."""
        require_person(actor)
        if not self._limits.self_service and not set(actor.identity.roles) & set(OPERATORS):
            raise OrganizationsByOperators()
        return await self.create_for(actor, name)

    async def create_for(self, actor: Actor, name: str) -> Organization:
        """As `create`, for who may make organisations for others. Raises TooManyOrganizations."""
        now = self._clock.now()
        made = Organization(ids.uuid7(), name, DEFAULT_PLAN, False, OrgRole.OWNER, now)
        async with self._sessions.begin() as session:
            await self._make_room(session, actor.user_id)
            await add_organization(session, made, actor.user_id)
            entry = audit_entry(actor, "organization.created", "organization", made.id, made.id, after={"name": name})
            await audit.append(session, entry, now)
        return made

    async def get(self, actor: Actor, org_id: UUID) -> Organization:
        """Raises OrganizationNotFound."""
        require_person(actor)
        async with self._sessions() as session:
            return await OrganizationRepository(session, tenant=org_id).get(actor.user_id)

    async def rename(self, actor: Actor, org_id: UUID, name: str) -> Organization:
        """Raises OrganizationNotFound, NotAllowedInOrganization."""
        require_person(actor)
        async with self._sessions.begin() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            await repository.lock()
            before = await repository.get(actor.user_id)
            check_may_manage(before.role, OrgRole.MEMBER)
            await repository.rename(name)
            entry = audit_entry(
                actor,
                "organization.updated",
                "organization",
                org_id,
                org_id,
                before={"name": before.name},
                after={"name": name},
            )
            await audit.append(session, entry, self._clock.now())
            return await repository.get(actor.user_id)

    async def members(self, actor: Actor, org_id: UUID) -> list[Member]:
        """Raises OrganizationNotFound."""
        require_person(actor)
        async with self._sessions() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            await repository.get(actor.user_id)
            return await repository.members()

    async def set_role(self, actor: Actor, org_id: UUID, user_id: UUID, role: OrgRole) -> Member:
        """Raises OrganizationNotFound, MemberNotFound, NotAllowedInOrganization, LastOwner."""
        require_person(actor)
        async with self._sessions.begin() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            await repository.lock()
            own = (await repository.get(actor.user_id)).role
            member = await repository.member(user_id)
            check_may_manage(own, member.role)
            check_may_manage(own, role)
            if member.role is role:
                return member
            await repository.set_role(user_id, role)
            await self._keep_an_owner(repository)
            keys = await KeyRepository(session, tenant=org_id).owner_changed(user_id)
            signed_in = await SessionRepository(session).owner_changed(user_id, self._clock.now(), org_id=org_id)
            entry = audit_entry(
                actor, "member.role_set", "user", user_id, org_id, before=member.role.value, after=role.value
            )
            await audit.append(session, entry, self._clock.now())
            changed = await repository.member(user_id)
        await self._outbox.deliver([*keys, *signed_in])
        return changed

    async def remove_member(self, actor: Actor, org_id: UUID, user_id: UUID) -> None:
        """Remove a member, or leave. Their keys of this organisation are revoked.

        Raises OrganizationNotFound, MemberNotFound, NotAllowedInOrganization, LastOwner.
        """
        require_person(actor)
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            await repository.lock()
            own = (await repository.get(actor.user_id)).role
            member = await repository.member(user_id)
            if user_id != actor.user_id:
                check_may_manage(own, member.role)
            await repository.remove_member(user_id)
            await self._keep_an_owner(repository)
            keys = await KeyRepository(session, tenant=org_id, owner=user_id).revoke_all(now)
            signed_in = await SessionRepository(session).owner_changed(user_id, now, org_id=org_id)
            entry = audit_entry(
                actor,
                "member.removed",
                "user",
                user_id,
                org_id,
                before=member.role.value,
                after=None,
                keys_revoked=len(keys),
            )
            await audit.append(session, entry, now)
        await self._outbox.deliver([*keys, *signed_in])

    async def invite(self, actor: Actor, org_id: UUID, role: OrgRole, ttl_s: int | None) -> NewInvitation:
        """An invitation whose token works once.

        Raises OrganizationNotFound, NotAllowedInOrganization, TooManyInvitations.
        """
        require_person(actor)
        now = self._clock.now()
        expires_at = now + timedelta(seconds=ttl_s or self._limits.invitation_ttl_s)
        token = INVITATION_PREFIX + secrets.token_urlsafe(INVITATION_BYTES)
        made = Invitation(ids.uuid7(), org_id, role, actor.user_id, now, expires_at)
        async with self._sessions.begin() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            await repository.lock()
            check_may_manage((await repository.get(actor.user_id)).role, role)
            if len(await repository.invitations(now)) >= self._limits.invitations_max:
                raise TooManyInvitations()
            await repository.add_invitation(made, _digest(token))
            entry = audit_entry(actor, "invitation.created", "invitation", made.id, org_id, after={"role": role.value})
            await audit.append(session, entry, now)
        return NewInvitation(made, token)

    async def invitations(self, actor: Actor, org_id: UUID) -> list[Invitation]:
        """Those that are open. Raises OrganizationNotFound, NotAllowedInOrganization."""
        require_person(actor)
        async with self._sessions() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            check_may_manage((await repository.get(actor.user_id)).role, OrgRole.MEMBER)
            return await repository.invitations(self._clock.now())

    async def withdraw(self, actor: Actor, org_id: UUID, invitation_id: UUID) -> None:
        """Raises OrganizationNotFound, NotAllowedInOrganization, InvitationNotFound."""
        require_person(actor)
        async with self._sessions.begin() as session:
            repository = OrganizationRepository(session, tenant=org_id)
            check_may_manage((await repository.get(actor.user_id)).role, OrgRole.MEMBER)
            await repository.remove_invitation(invitation_id)
            entry = audit_entry(actor, "invitation.withdrawn", "invitation", invitation_id, org_id)
            await audit.append(session, entry, self._clock.now())

    async def join(self, actor: Actor, token: str) -> Organization:
        """Accept an invitation, which is used up; a member stays what they are.

        Raises InvalidInvitation for every reason alike, TooManyMembers, TooManyOrganizations.
        """
        require_person(actor)
        now = self._clock.now()
        async with self._sessions.begin() as session:
            await self._make_room(session, actor.user_id)
            invitation = await take_invitation(session, _digest(token), now)
            if invitation is None:
                raise InvalidInvitation()
            repository = OrganizationRepository(session, tenant=invitation.org_id)
            await repository.lock()
            if await repository.add_member(actor.user_id, invitation.role, now):
                if len(await repository.members()) > self._limits.members_max:
                    raise TooManyMembers()
                entry = audit_entry(
                    actor,
                    "member.joined",
                    "user",
                    actor.user_id,
                    invitation.org_id,
                    before=None,
                    after=invitation.role.value,
                    invitation=str(invitation.id),
                )
                await audit.append(session, entry, now)
            return await repository.get(actor.user_id)

    async def _make_room(self, session: AsyncSession, user_id: UUID) -> None:
        """A person joins and makes organisations one by one."""
        await AccountRepository(session).lock_user(user_id)
        if len(await organizations_of(session, user_id)) >= self._limits.per_user_max:
            raise TooManyOrganizations()

    @staticmethod
    async def _keep_an_owner(repository: OrganizationRepository) -> None:
        if await repository.count_owners() == 0:
            raise LastOwner()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
