"""Organisations, their members and invitations."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from services.auth.domain.organizations import Invitation, Member, Organization, OrgRole
from services.auth.errors import InvitationNotFound, MemberNotFound, OrganizationNotFound
from services.auth.repository.accounts import PERSON
from services.auth.tables import InvitationRow, MembershipRow, OrganizationRow, UserRow
from shared.database import AsyncSession


async def organizations_of(session: AsyncSession, user_id: UUID) -> list[Organization]:
    """The active organisations that a user belongs to, the first one first."""
    statement = _organizations().where(MembershipRow.user_id == user_id)
    rows = await session.execute(statement.order_by(MembershipRow.created_at, OrganizationRow.id))
    return [_organization(row) for row in rows]


async def page_of_organizations(session: AsyncSession, *, before: UUID | None, limit: int) -> list[Organization]:
    """All of the installation, newest first; `role` says nothing here."""
    statement = select(OrganizationRow).order_by(OrganizationRow.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(OrganizationRow.id < before)
    return [
        Organization(row.id, row.name, row.plan, row.personal, OrgRole.MEMBER, row.created_at)
        for row in await session.scalars(statement)
    ]


async def add_organization(session: AsyncSession, organization: Organization, owner_id: UUID) -> None:
    """Insert an organisation with its first owner."""
    await session.execute(
        insert(OrganizationRow).values(
            id=organization.id, name=organization.name, plan=organization.plan, created_at=organization.created_at
        )
    )
    repository = OrganizationRepository(session, tenant=organization.id)
    await repository.add_member(owner_id, OrgRole.OWNER, organization.created_at)


async def take_invitation(session: AsyncSession, digest: str, now: datetime) -> Invitation | None:
    """The invitation of a token, which is used up; None for an unknown or expired one."""
    statement = delete(InvitationRow).where(InvitationRow.digest == digest, InvitationRow.expires_at > now)
    row = (await session.scalars(statement.returning(InvitationRow))).one_or_none()
    return _invitation(row) if row else None


class OrganizationRepository:
    """One organisation: `tenant` is in the condition of every statement."""

    def __init__(self, session: AsyncSession, *, tenant: UUID) -> None:
        self._session = session
        self._tenant = tenant

    async def get(self, user_id: UUID) -> Organization:
        """As one of its members sees it. Raises OrganizationNotFound for others."""
        statement = _organizations().where(MembershipRow.user_id == user_id, OrganizationRow.id == self._tenant)
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise OrganizationNotFound()
        return _organization(row)

    async def lock(self) -> bool:
        """Members change one after the other until the transaction ends. Whether there is such an organisation."""
        statement = select(OrganizationRow.id).where(OrganizationRow.id == self._tenant)
        return (await self._session.execute(statement.with_for_update(key_share=True))).scalar() is not None

    async def rename(self, name: str) -> None:
        await self._session.execute(update(OrganizationRow).where(OrganizationRow.id == self._tenant).values(name=name))

    async def members(self) -> list[Member]:
        """All of them, the first one first; how many there can be is bounded."""
        rows = await self._session.execute(self._members().order_by(MembershipRow.created_at, UserRow.id))
        return [_member(row) for row in rows]

    async def member(self, user_id: UUID) -> Member:
        """Raises MemberNotFound."""
        row = (await self._session.execute(self._members().where(UserRow.id == user_id))).one_or_none()
        if row is None:
            raise MemberNotFound()
        return _member(row)

    async def add_member(self, user_id: UUID, role: OrgRole, now: datetime) -> bool:
        """Whether they were none before; a member stays what they are."""
        statement = upsert(MembershipRow).values(org_id=self._tenant, user_id=user_id, role=role.value, created_at=now)
        added = await self._session.scalars(statement.on_conflict_do_nothing().returning(MembershipRow.user_id))
        return added.one_or_none() is not None

    async def set_role(self, user_id: UUID, role: OrgRole) -> None:
        await self._session.execute(update(MembershipRow).where(*self._membership(user_id)).values(role=role.value))

    async def remove_member(self, user_id: UUID) -> None:
        await self._session.execute(delete(MembershipRow).where(*self._membership(user_id)))

    async def add_invitation(self, invitation: Invitation, digest: str) -> None:
        await self._session.execute(
            insert(InvitationRow).values(
                id=invitation.id,
                org_id=self._tenant,
                role=invitation.role.value,
                digest=digest,
                invited_by=invitation.invited_by,
                created_at=invitation.created_at,
                expires_at=invitation.expires_at,
            )
        )

    async def invitations(self, now: datetime) -> list[Invitation]:
        """Those that can still be accepted, newest first; how many there can be is bounded."""
        statement = select(InvitationRow).where(InvitationRow.org_id == self._tenant, InvitationRow.expires_at > now)
        return [_invitation(row) for row in await self._session.scalars(statement.order_by(InvitationRow.id.desc()))]

    async def remove_invitation(self, invitation_id: UUID) -> None:
        """Raises InvitationNotFound."""
        statement = delete(InvitationRow).where(InvitationRow.org_id == self._tenant, InvitationRow.id == invitation_id)
        if (await self._session.scalars(statement.returning(InvitationRow.id))).one_or_none() is None:
            raise InvitationNotFound()

    async def count_owners(self) -> int:
        statement = (
            select(func.count())
            .select_from(MembershipRow)
            .where(MembershipRow.org_id == self._tenant, MembershipRow.role == OrgRole.OWNER.value)
        )
        return int((await self._session.execute(statement)).scalar_one())

    def _membership(self, user_id: UUID) -> tuple[ColumnElement[bool], ...]:
        return (MembershipRow.org_id == self._tenant, MembershipRow.user_id == user_id)

    def _members(self) -> Select[UUID, str, str, datetime]:
        return (
            select(UserRow.id, UserRow.username, MembershipRow.role, MembershipRow.created_at)
            .join(MembershipRow, MembershipRow.user_id == UserRow.id)
            .where(MembershipRow.org_id == self._tenant, UserRow.kind == PERSON)
        )


def _organizations() -> Select[OrganizationRow, str]:
    return (
        select(OrganizationRow, MembershipRow.role)
        .join(MembershipRow, MembershipRow.org_id == OrganizationRow.id)
        .where(OrganizationRow.status == "active")
    )


def _organization(row: Row[OrganizationRow, str]) -> Organization:
    found, role = row
    return Organization(found.id, found.name, found.plan, found.personal, OrgRole(role), found.created_at)


def _member(row: Row[UUID, str, str, datetime]) -> Member:
    user_id, username, role, created_at = row
    return Member(user_id, username, OrgRole(role), created_at)


def _invitation(row: InvitationRow) -> Invitation:
    return Invitation(row.id, row.org_id, OrgRole(row.role), row.invited_by, row.created_at, row.expires_at)
