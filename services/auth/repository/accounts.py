"""Users, their organisations and roles."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, delete, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError

from services.auth.domain import BASE_ROLE, Account, UserStatus, UserSummary
from services.auth.errors import EmailTaken, UsernameTaken
from services.auth.tables import MembershipRow, OrganizationRow, RolePermissionRow, UserRoleRow, UserRow
from shared.database import AsyncSession

_ROLES = (
    func.array(
        select(UserRoleRow.role)
        .where(UserRoleRow.user_id == UserRow.id)
        .order_by(UserRoleRow.role)
        .correlate(UserRow)
        .scalar_subquery()
    )
).label("roles")
_SCOPES = (
    func.array(
        select(RolePermissionRow.scope)
        .join(UserRoleRow, UserRoleRow.role == RolePermissionRow.role)
        .where(UserRoleRow.user_id == UserRow.id)
        .group_by(RolePermissionRow.scope)
        .order_by(RolePermissionRow.scope)
        .correlate(UserRow)
        .scalar_subquery()
    )
).label("scopes")


PERSON = "person"
LAST_CHARACTER = "\U0010ffff"  # what begins with a text is between it and it with this behind


class AccountRepository:
    """Accounts: a user together with one organisation."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def register(self, account: Account) -> None:
        """Insert a user with a personal organisation. Raises UsernameTaken or EmailTaken."""
        try:
            await self._session.execute(
                insert(UserRow).values(
                    id=account.user_id,
                    username=account.username,
                    email=account.email,
                    password_hash=account.password_hash,
                    status=account.status,
                    created_at=account.created_at,
                    updated_at=account.created_at,
                )
            )
        except IntegrityError as e:
            if "uq_user_account_username_lower" in str(e.orig):
                raise UsernameTaken(param="username") from None
            if "uq_user_account_email_lower" in str(e.orig):
                raise EmailTaken(param="email") from None
            raise
        await self._session.execute(
            insert(OrganizationRow).values(
                id=account.org_id,
                name=account.org_name,
                plan=account.plan,
                personal=True,
                created_at=account.created_at,
            )
        )
        await self._session.execute(
            insert(MembershipRow).values(
                org_id=account.org_id, user_id=account.user_id, role=account.org_role, created_at=account.created_at
            )
        )
        await self.grant_role(account.user_id, BASE_ROLE)

    async def grant_role(self, user_id: UUID, role: str) -> None:
        """Give a role on the installation; nothing happens where it is held already."""
        await self._session.execute(upsert(UserRoleRow).values(user_id=user_id, role=role).on_conflict_do_nothing())

    async def take_role(self, user_id: UUID, role: str) -> None:
        """Take a role on the installation; nothing happens where it is not held."""
        await self._session.execute(delete(UserRoleRow).where(UserRoleRow.user_id == user_id, UserRoleRow.role == role))

    async def find_by_login(self, login: str) -> Account | None:
        """The account of a user name or an e-mail address, in the user's first organisation that is active."""
        folded = func.lower(login)  # by PostgreSQL, as the indexes are: Python folds some letters otherwise
        return await self._one(
            _accounts().where(
                UserRow.kind == PERSON, or_(func.lower(UserRow.username) == folded, func.lower(UserRow.email) == folded)
            )
        )

    async def find_by_email(self, email: str) -> Account | None:
        """The account of an address, in the user's first organisation that is active."""
        return await self._one(_accounts().where(func.lower(UserRow.email) == func.lower(email)))

    async def holds_username(self, username: str) -> bool:
        """Whether somebody has the name."""
        statement = select(UserRow.id).where(func.lower(UserRow.username) == func.lower(username))
        return (await self._session.execute(statement)).scalar() is not None

    async def find_first(self, user_id: UUID) -> Account | None:
        """The account of a user, in their first organisation that is active."""
        return await self._one(_accounts().where(UserRow.id == user_id, UserRow.kind == PERSON))

    async def has_verified_email(self, user_id: UUID) -> bool:
        statement = select(UserRow.email_verified_at).where(UserRow.id == user_id)
        return (await self._session.execute(statement)).scalar() is not None

    async def find(self, user_id: UUID, org_id: UUID) -> Account | None:
        """The account of a member of an organisation; None for strangers and suspended organisations."""
        return await self._one(_accounts().where(UserRow.id == user_id, OrganizationRow.id == org_id))

    async def lock_user(self, user_id: UUID) -> tuple[UserStatus, tuple[str, ...]] | None:
        """A user's status and roles, locked until the transaction ends."""
        row = (await self._session.execute(select(UserRow).where(UserRow.id == user_id).with_for_update())).scalar()
        if row is None:
            return None
        roles = await self._session.scalars(select(UserRoleRow.role).where(UserRoleRow.user_id == user_id))
        return UserStatus(row.status), tuple(roles)

    async def set_status(self, user_id: UUID, status: UserStatus, now: datetime) -> None:
        await self._session.execute(update(UserRow).where(UserRow.id == user_id).values(status=status, updated_at=now))

    async def set_password_hash(self, user_id: UUID, new: str, now: datetime) -> None:
        """Set a hash, whatever it was. For who proved otherwise that they may."""
        await self._session.execute(
            update(UserRow).where(UserRow.id == user_id).values(password_hash=new, updated_at=now)
        )

    async def set_email_verified(self, user_id: UUID, email: str, now: datetime) -> None:
        """The address is the user's, if they still have it."""
        await self._session.execute(
            update(UserRow)
            .where(UserRow.id == user_id, UserRow.email == email)
            .values(email_verified_at=now, updated_at=now)
        )

    async def replace_password_hash(self, user_id: UUID, present: str, new: str, now: datetime) -> bool:
        """Set a hash in place of one; whether the user is active and had that one."""
        statement = update(UserRow).where(*_unchanged(user_id, present)).values(password_hash=new, updated_at=now)
        return (await self._session.execute(statement.returning(UserRow.id))).scalar() is not None

    async def _one(self, statement: Select[UserRow, OrganizationRow, str, list[str], list[str]]) -> Account | None:
        ordered = statement.order_by(MembershipRow.created_at, MembershipRow.org_id).limit(1)
        row = (await self._session.execute(ordered)).one_or_none()
        return _account(row) if row else None


async def page_of_users(
    session: AsyncSession, *, search: str = "", before: UUID | None, limit: int
) -> list[UserSummary]:
    """Everybody, newest first; or those whose user name (with an `@`: whose address) begins with `search`, by that. The
    page begins after the user `before`.
    """
    statement = select(UserRow, _ROLES).limit(limit)
    if search:
        # By the operators of text_pattern_ops: in the order of bytes, whatever the database's own.
        found, first = func.lower(UserRow.email if "@" in search else UserRow.username), func.lower(search)
        within = (
            found.op("~>=~", is_comparison=True)(first),
            found.op("~<~", is_comparison=True)(func.concat(first, LAST_CHARACTER)),
        )
        statement = statement.where(*within).order_by(found.op("USING")(text("~<~")))
        if before is not None:
            last = select(found).where(UserRow.id == before).correlate(None).scalar_subquery()
            statement = statement.where(found.op("~>~", is_comparison=True)(last))
    else:
        statement = statement.order_by(UserRow.id.desc())
        if before is not None:
            statement = statement.where(UserRow.id < before)
    return [
        UserSummary(
            id=user.id,
            name=user.display_name or user.username,
            kind=user.kind,
            email=user.email or "",
            status=UserStatus(user.status),
            roles=tuple(roles),
            created_at=user.created_at,
        )
        for user, roles in await session.execute(statement)
    ]


def _unchanged(user_id: UUID, password_hash: str) -> tuple[ColumnElement[bool], ...]:
    return (UserRow.id == user_id, UserRow.password_hash == password_hash, UserRow.status == UserStatus.ACTIVE)


def _accounts() -> Select[UserRow, OrganizationRow, str, list[str], list[str]]:
    return (
        select(UserRow, OrganizationRow, MembershipRow.role, _ROLES, _SCOPES)
        .join(MembershipRow, MembershipRow.user_id == UserRow.id)
        .join(OrganizationRow, OrganizationRow.id == MembershipRow.org_id)
        .where(OrganizationRow.status == "active")
    )


def _account(row: Row[UserRow, OrganizationRow, str, list[str], list[str]]) -> Account:
    user, organization, org_role, roles, scopes = row
    return Account(
        user_id=user.id,
        username=user.username,
        email=user.email or "",
        password_hash=user.password_hash,
        status=UserStatus(user.status),
        created_at=user.created_at,
        org_id=organization.id,
        org_name=organization.name,
        org_role=org_role,
        plan=organization.plan,
        roles=tuple(roles),
        scopes=tuple(scopes),
    )
