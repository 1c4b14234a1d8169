"""Service accounts: users that are no people, each in one organisation."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Row, Select, insert, select, update

from services.auth.domain import BASE_ROLE, UserStatus
from services.auth.domain.organizations import OrgRole, ServiceAccount
from services.auth.errors import ServiceAccountNotFound
from services.auth.tables import MembershipRow, UserRoleRow, UserRow
from shared.database import AsyncSession

SERVICE = "service"
NO_PASSWORD = "!"  # noqa: S105 - no PHC string, so that no password matches it


class ServiceAccountRepository:
    """Those of one organisation: `tenant` is in the condition of every statement."""

    def __init__(self, session: AsyncSession, *, tenant: UUID) -> None:
        self._session = session
        self._tenant = tenant

    async def add(self, account: ServiceAccount) -> None:
        await self._session.execute(
            insert(UserRow).values(
                id=account.id,
                username=f"service-{account.id.hex}",
                password_hash=NO_PASSWORD,
                kind=SERVICE,
                display_name=account.name,
                created_at=account.created_at,
                updated_at=account.created_at,
            )
        )
        await self._session.execute(
            insert(MembershipRow).values(
                org_id=self._tenant, user_id=account.id, role=OrgRole.MEMBER.value, created_at=account.created_at
            )
        )
        await self._session.execute(insert(UserRoleRow).values(user_id=account.id, role=BASE_ROLE))

    async def all(self) -> list[ServiceAccount]:
        """The first one first; how many there can be is bounded."""
        rows = await self._session.execute(self._accounts().order_by(UserRow.id))
        return [_account(row) for row in rows]

    async def lock(self, account_id: UUID) -> ServiceAccount:
        """One of them, which stays until the transaction ends. Raises ServiceAccountNotFound."""
        statement = self._accounts().where(UserRow.id == account_id).with_for_update(of=MembershipRow)
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise ServiceAccountNotFound()
        return _account(row)

    async def disable(self, account_id: UUID, now: datetime) -> None:
        """It is no longer found; the row stays, for its keys and the audit log."""
        await self._session.execute(
            update(UserRow)
            .where(UserRow.id == account_id, UserRow.kind == SERVICE)
            .values(status=UserStatus.DISABLED, updated_at=now)
        )

    def _accounts(self) -> Select[UUID, str | None, datetime]:
        return (
            select(UserRow.id, UserRow.display_name, UserRow.created_at)
            .join(MembershipRow, MembershipRow.user_id == UserRow.id)
            .where(MembershipRow.org_id == self._tenant, UserRow.kind == SERVICE, UserRow.status == UserStatus.ACTIVE)
        )


def _account(row: Row[UUID, str | None, datetime]) -> ServiceAccount:
    account_id, name, created_at = row
    return ServiceAccount(account_id, name or "", created_at)
