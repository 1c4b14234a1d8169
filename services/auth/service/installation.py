"""What the operator's command line does: it speaks for who holds the installation's secrets, not for an account."""

from __future__ import annotations

import getpass
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Account, Actor, ApiKey, Origin, Page, UserSummary, audit_entry, page_of
from services.auth.domain.mails import ISSUED_BY, OPERATOR, Purpose
from services.auth.domain.organizations import Organization, OrgRole
from services.auth.errors import OrganizationNotFound, UserNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository, page_of_users
from services.auth.repository.keys import KeyRepository
from services.auth.repository.organizations import organizations_of, page_of_organizations
from services.auth.repository.sessions import SessionRepository
from services.auth.service.email import Email
from services.auth.service.outbox import Outbox
from shared.clock import Clock
from shared.database import AsyncSession
from shared.identity import Identity

NOBODY = UUID(int=0)  # who acts in the audit log


def operator() -> Actor:
    """The command line as an actor; `request_id` in the audit log names the account on the machine."""
    identity = Identity("user", user_id=str(NOBODY), org_id=str(NOBODY), roles=("admin",), scopes=("*",))
    return Actor(identity, Origin(request_id=f"cli-{_user()}", user_agent="tollgate command line"), OrgRole.OWNER)


def on_behalf_of(account: Account, org_id: UUID | None = None) -> Actor:
    """An account's owner as an actor who may do everything, in an organisation of theirs."""
    tenant = str(org_id or account.org_id)
    identity = Identity("user", user_id=str(account.user_id), org_id=tenant, roles=account.roles, scopes=("*",))
    return Actor(identity, operator().origin, OrgRole.OWNER)


class Installation:
    def __init__(self, sessions: async_sessionmaker[AsyncSession], email: Email, outbox: Outbox, clock: Clock) -> None:
        self._sessions = sessions
        self._email = email
        self._outbox = outbox
        self._clock = clock

    async def user(self, login: str) -> Account:
        """By user name or address. Raises UserNotFound."""
        async with self._sessions() as session:
            account = await AccountRepository(session).find_by_login(login)
        if account is None:
            raise UserNotFound()
        return account

    async def users(self, *, search: str, before: UUID | None, limit: int) -> Page[UserSummary]:
        """Everybody, service accounts too, newest first; or those whose name, or address, begins with `search`."""
        async with self._sessions() as session:
            rows = await page_of_users(session, search=search, before=before, limit=limit + 1)
        return page_of(rows, limit, lambda user: user.id)

    async def organizations(self, *, before: UUID | None, limit: int) -> Page[Organization]:
        """All, newest first."""
        async with self._sessions() as session:
            rows = await page_of_organizations(session, before=before, limit=limit + 1)
        return page_of(rows, limit, lambda organization: organization.id)

    async def organization_of(self, account: Account, org_id: UUID) -> UUID:
        """The id, if the account belongs to it. Raises OrganizationNotFound."""
        async with self._sessions() as session:
            if org_id not in [organization.id for organization in await organizations_of(session, account.user_id)]:
                raise OrganizationNotFound()
        return org_id

    async def keys(self, *, org_id: UUID | None, user_id: UUID | None, limit: int) -> list[ApiKey]:
        """Of an organisation, of a user, or all; newest first."""
        async with self._sessions() as session:
            return await KeyRepository(session, tenant=org_id, owner=user_id).page(before=None, limit=limit)

    async def set_role(self, account: Account, role: str, *, held: bool) -> tuple[str, ...]:
        """Give a role on the installation, or take it; the roles then. Keys and sessions see it at the next request."""
        before = set(account.roles)
        after = before | {role} if held else before - {role}
        if after == before:
            return tuple(sorted(before))
        now = self._clock.now()
        async with self._sessions.begin() as session:
            accounts = AccountRepository(session)
            if await accounts.lock_user(account.user_id) is None:
                raise UserNotFound()
            await (accounts.grant_role if held else accounts.take_role)(account.user_id, role)
            keys = await KeyRepository(session, tenant=None).owner_changed(account.user_id)
            signed_in = await SessionRepository(session).owner_changed(account.user_id, now)
            action = "user.role_granted" if held else "user.role_taken"
            entry = audit_entry(
                operator(), action, "user", account.user_id, account.org_id, before=sorted(before), after=sorted(after)
            )
            await audit.append(session, entry, now)
        await self._outbox.deliver([*keys, *signed_in])
        return tuple(sorted(after))

    async def password_token(self, account: Account) -> str:
        """A token that sets a new password, for who cannot get it by e-mail."""
        entry = audit_entry(operator(), "user.password_token_issued", "user", account.user_id, account.org_id)
        async with self._sessions.begin() as session:
            await audit.append(session, entry, self._clock.now())
        return await self._email.issue(Purpose.RESET, account.email, account, {ISSUED_BY: OPERATOR})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in many containers
        return "unknown"
