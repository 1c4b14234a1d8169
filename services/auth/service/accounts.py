"""People: registration, password, profile."""

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
    audit_entry,
)
from services.auth.domain.fields import check_password
from services.auth.errors import PasswordQueueFull, UserNotFound, WrongPassword
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.email import EmailRepository
from services.auth.repository.sessions import SessionRepository
from services.auth.service.attempts import Attempts
from services.auth.service.outbox import Outbox
from services.auth.service.passwords import Passwords
from services.auth.service.sessions import require_person
from shared import ids
from shared.clock import Clock
from shared.database import AsyncSession


class Accounts:
    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        passwords: Passwords,
        attempts: Attempts,
        outbox: Outbox,
        clock: Clock,
    ) -> None:
        self._sessions = sessions
        self._passwords = passwords
        self._attempts = attempts
        self._outbox = outbox
        self._clock = clock

    async def register(self, *, username: str, email: str, password: str, origin: Origin) -> Account:
        """A new user with a personal organisation on the default plan.

        Raises InvalidRequest and WeakPassword for the password, UsernameTaken, EmailTaken, PasswordQueueFull.
        """
        check_password(password, username=username, email=email)
        account = self.new(username=username, email=email, password_hash=await self._passwords.hash(password))
        async with self._sessions.begin() as session:
            await self.add(session, account, origin)
        return account

    def new(self, *, username: str, email: str, password_hash: str) -> Account:
        """A user with a personal organisation on the default plan, not yet stored."""
        return Account(
            user_id=ids.uuid7(),
            username=username,
            email=email,
            password_hash=password_hash,
            status=UserStatus.ACTIVE,
            created_at=self._clock.now(),
            org_id=ids.uuid7(),
            org_name=username,
            org_role="owner",
            plan=DEFAULT_PLAN,
            roles=(BASE_ROLE,),
            scopes=(),
        )

    async def add(self, session: AsyncSession, account: Account, origin: Origin) -> None:
        """Store a new account in a transaction. Raises UsernameTaken, EmailTaken."""
        await AccountRepository(session).register(account)
        entry = AuditEntry(
            "user.registered", "user", account.user_id, account.user_id, None, account.org_id, origin, {}
        )
        await audit.append(session, entry, self._clock.now())

    async def change_password(self, actor: Actor, *, old: str, new: str) -> None:
        """Change the actor's own password, end their other sessions and every token in an e-mail. Keys are no
        sessions, and stay.

        Raises WrongPassword, InvalidRequest and WeakPassword for the new one, SignInBlocked, PasswordQueueFull,
        PermissionDenied for an API key.
        """
        require_person(actor)
        account = await self.profile(actor)
        check_password(new, username=account.username, email=account.email, field="new_password")
        # Counted apart from sign-ins, or a token's thief could block them.
        async with self._attempts.of(f"user {actor.user_id}", actor.origin.address) as attempt:
            try:
                correct = (await self._passwords.verify(account.password_hash, old)).correct
                new_hash = await self._passwords.hash(new) if correct else ""
            except PasswordQueueFull:
                attempt.withdraw()
                raise
            if not correct:
                await self._record_wrong_password(actor)
                raise WrongPassword(param="old_password")
            attempt.succeeded()
        now = self._clock.now()
        async with self._sessions.begin() as session:
            accounts = AccountRepository(session)
            if not await accounts.replace_password_hash(actor.user_id, account.password_hash, new_hash, now):
                raise WrongPassword(param="old_password", detail="password or status changed meanwhile")
            await EmailRepository(session).remove_tokens_of(actor.user_id)
            events = await SessionRepository(session).revoke_all(
                actor.user_id, now, "password_changed", but=actor.session_id
            )
            entry = audit_entry(actor, "user.password_changed", "user", actor.user_id, actor.org_id)
            await audit.append(session, entry, now)
        await self._outbox.deliver(events)

    async def _record_wrong_password(self, actor: Actor) -> None:
        entry = audit_entry(actor, "user.password_change_failed", "user", actor.user_id, actor.org_id)
        async with self._sessions.begin() as session:
            await audit.append(session, entry, self._clock.now())

    async def profile(self, actor: Actor) -> Account:
        """The actor's own account. Raises UserNotFound when it went meanwhile."""
        async with self._sessions() as session:
            account = await AccountRepository(session).find(actor.user_id, actor.org_id)
        if account is None:
            raise UserNotFound()
        return account
