"""People: registration and profile."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import (
    BASE_ROLE,
    DEFAULT_PLAN,
    Account,
    Actor,
    AuditEntry,
    Origin,
    UserStatus,
    check_password,
)
from services.auth.errors import UserNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.service.passwords import Passwords
from shared import ids
from shared.clock import Clock
from shared.database import AsyncSession


class Accounts:
    def __init__(self, sessions: async_sessionmaker[AsyncSession], passwords: Passwords, clock: Clock) -> None:
        self._sessions = sessions
        self._passwords = passwords
        self._clock = clock

    async def register(self, *, username: str, email: str, password: str, origin: Origin) -> Account:
        """A new user with a personal organisation on the default plan.

        Raises InvalidRequest and WeakPassword for the password, UsernameTaken, EmailTaken, PasswordQueueFull.
        """
        check_password(password, username=username, email=email)
        account = Account(
            user_id=ids.uuid7(),
            username=username,
            email=email,
            password_hash=await self._passwords.hash(password),
            status=UserStatus.ACTIVE,
            created_at=self._clock.now(),
            org_id=ids.uuid7(),
            org_name=username,
            org_role="owner",
            plan=DEFAULT_PLAN,
            roles=(BASE_ROLE,),
            scopes=(),
        )
        entry = AuditEntry(
            "user.registered", "user", account.user_id, account.user_id, None, account.org_id, origin, {}
        )
        async with self._sessions.begin() as session:
            await AccountRepository(session).register(account)
            await audit.append(session, entry, self._clock.now())
        return account

    async def profile(self, actor: Actor) -> Account:
        """The actor's own account. Raises UserNotFound when it went meanwhile."""
        async with self._sessions() as session:
            account = await AccountRepository(session).find(actor.user_id, actor.org_id)
        if account is None:
            raise UserNotFound()
        return account
