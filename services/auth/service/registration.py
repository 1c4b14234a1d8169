"""How people get accounts, prove their addresses, and come back when they forgot their password.

With registration `verified`, an account is made when its address is proven, not before: until then name and address
are free, and the answer is the same for an address that has an account.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Account, Actor, AuditEntry, Event, Origin, RegistrationMode, UserStatus
from services.auth.domain.fields import check_password
from services.auth.domain.mails import ISSUED_BY, OPERATOR, EmailToken, Order, Purpose
from services.auth.errors import EmailTaken, InvalidEmailToken, RegistrationClosed, UsernameTaken, WrongPassword
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.email import EmailRepository
from services.auth.repository.keys import KeyRepository
from services.auth.repository.sessions import SessionRepository
from services.auth.service.accounts import Accounts
from services.auth.service.email import Email, digest
from services.auth.service.outbox import Outbox
from services.auth.service.passwords import Passwords
from services.auth.service.sessions import require_person
from shared.clock import Clock
from shared.database import AsyncSession


class Registration:
    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        mode: RegistrationMode,
        accounts: Accounts,
        passwords: Passwords,
        email: Email,
        outbox: Outbox,
        clock: Clock,
    ) -> None:
        self._sessions = sessions
        self._mode = mode
        self._accounts = accounts
        self._passwords = passwords
        self._email = email
        self._outbox = outbox
        self._clock = clock

    async def register(self, *, username: str, email: str, password: str, origin: Origin) -> Account | None:
        """The new account; None where its address is to be proven first, whether it has an account or not.

        Raises RegistrationClosed, UsernameTaken, EmailTaken (only where registration is open), InvalidRequest and
        WeakPassword for the password, PasswordQueueFull, EmailBusy.
        """
        if self._mode is RegistrationMode.CLOSED:
            raise RegistrationClosed()
        if self._mode is RegistrationMode.OPEN:
            return await self._accounts.register(username=username, email=email, password=password, origin=origin)
        check_password(password, username=username, email=email)
        async with self._sessions() as session:
            if await AccountRepository(session).holds_username(username):
                raise UsernameTaken(param="username")
        password_hash = await self._passwords.hash(password)
        payload = {"username": username, "password_hash": password_hash}
        await self._email.order(Order(Purpose.REGISTER, email, payload))
        return None

    async def ask_verification(self, actor: Actor) -> None:
        """Send a token to the actor's own address. Raises EmailNotConfigured, EmailBusy, PermissionDenied for a key."""
        require_person(actor)
        account = await self._accounts.profile(actor)
        await self._email.order(Order(Purpose.VERIFY, account.email))

    async def confirm(self, token: str, password: str, origin: Origin) -> Account | None:
        """Take a token that proves an address: the account that it makes, or None where it was there.

        Whoever reads the mailbox must be who chose the password, or one proves the address for the other's account.
        Raises InvalidEmailToken for every reason alike, WrongPassword (the token stays), UsernameTaken when somebody
        took the name meanwhile, PasswordQueueFull.
        """
        now = self._clock.now()
        purposes = (Purpose.REGISTER, Purpose.VERIFY)
        async with self._sessions() as session:
            found = await EmailRepository(session).find_token(digest(token), purposes, now)
            account = (
                await AccountRepository(session).find_first(UUID(found.user_id)) if found and found.user_id else None
            )
        if found is None:
            raise InvalidEmailToken(param="token")
        chosen = account.password_hash if account else found.payload.get("password_hash")
        if not (await self._passwords.verify(chosen, password)).correct:
            raise WrongPassword("password: this is not the one that was chosen for the account.", param="password")
        async with self._sessions.begin() as session:
            proven = await EmailRepository(session).take_token(digest(token), purposes, now)
            if proven is None:
                raise InvalidEmailToken(param="token")
            if proven.purpose is Purpose.REGISTER:
                return await self._make(session, proven, origin)
            user_id = UUID(str(proven.user_id))
            await AccountRepository(session).set_email_verified(user_id, proven.address, now)
            await audit.append(session, _by_mail("user.email_verified", user_id, origin), now)
        return None

    async def forgot_password(self, email: str) -> None:
        """Send a token to an address, if it has an account. Raises EmailNotConfigured, EmailBusy."""
        await self._email.order(Order(Purpose.RESET, email))

    async def reset_password(self, token: str, *, new: str, origin: Origin) -> None:
        """Set a password by a token, end all sessions; a token from a mailbox proves its address. Where nobody had
        before, whoever made the account's keys may have been somebody else: they are revoked.

        Raises InvalidEmailToken for every reason alike, InvalidRequest and WeakPassword for the new one,
        PasswordQueueFull.
        """
        check_password(new, username="", email="", field="new_password")
        new_hash = await self._passwords.hash(new)
        now = self._clock.now()
        async with self._sessions.begin() as session:
            emails, accounts = EmailRepository(session), AccountRepository(session)
            taken = await emails.take_token(digest(token), (Purpose.RESET,), now)
            user_id = UUID(taken.user_id) if taken and taken.user_id else None
            found = await accounts.lock_user(user_id) if user_id else None
            if taken is None or user_id is None or found is None or found[0] is not UserStatus.ACTIVE:
                raise InvalidEmailToken(param="token")
            await accounts.set_password_hash(user_id, new_hash, now)
            events: list[Event] = []
            if taken.payload.get(ISSUED_BY) != OPERATOR:
                if not await accounts.has_verified_email(user_id):
                    events += await KeyRepository(session, tenant=None, owner=user_id).revoke_all(now)
                await accounts.set_email_verified(user_id, taken.address, now)
            await emails.remove_tokens_of(user_id)
            events += await SessionRepository(session).revoke_all(user_id, now, "password_reset")
            await audit.append(session, _by_mail("user.password_reset", user_id, origin), now)
        await self._outbox.deliver(events)

    async def _make(self, session: AsyncSession, proven: EmailToken, origin: Origin) -> Account:
        account = self._accounts.new(
            username=proven.payload["username"], email=proven.address, password_hash=proven.payload["password_hash"]
        )
        try:
            await self._accounts.add(session, account, origin)
        except EmailTaken:
            raise InvalidEmailToken(param="token") from None
        await AccountRepository(session).set_email_verified(account.user_id, account.email, self._clock.now())
        return account


def _by_mail(action: str, user_id: UUID, origin: Origin) -> AuditEntry:
    return AuditEntry(action, "user", user_id, user_id, None, None, origin, {})
