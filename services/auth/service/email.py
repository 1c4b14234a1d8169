"""E-mail: orders are written down by requests, and carried out by a task.

A request never looks whether an address has an account: it writes the same order in the same time for every address,
and the task finds out who, if anybody, gets a message. Tokens are made when they are sent, so that none is at rest but
as a digest. An order that fails is tried again with growing pauses; the order of a worker that died is taken over.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients import Mailer
from services.auth.domain import Account, UserStatus
from services.auth.domain.mails import EmailToken, Mail, Order, Purpose, taken_mail, token_mail
from services.auth.errors import EmailBusy, EmailNotConfigured, MailNotSent
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.email import EmailRepository, QueuedOrder
from shared.clock import Clock
from shared.database import AsyncSession
from shared.telemetry import AuthMetrics, get_logger

log = get_logger(__name__)

TOKEN_PREFIX = "tg_email_"  # noqa: S105 - public
TOKEN_BYTES = 32
SENT_MEMORY = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class EmailLimits:
    """`link_url`: where the pages are that take a token; empty: the message shows the token alone. Lifetimes of tokens;
    orders that may wait; messages to one address in an hour; attempts to send one, and the first pause between them.
    """

    link_url: str
    verification_ttl_s: int
    reset_ttl_s: int
    waiting_max: int
    per_address_hourly_max: int
    attempts_max: int
    retry_base_s: int
    send_timeout_s: int
    prune_batch_max: int

    def lifetime_s(self, purpose: Purpose) -> int:
        return self.reset_ttl_s if purpose is Purpose.RESET else self.verification_ttl_s


class Email:
    """`mailer` is None where no e-mail is configured: then nothing can be ordered."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        mailer: Mailer | None,
        clock: Clock,
        metrics: AuthMetrics,
        limits: EmailLimits,
    ) -> None:
        self._sessions = sessions
        self._mailer = mailer
        self._clock = clock
        self._metrics = metrics
        self._limits = limits

    def require(self) -> Mailer:
        """Raise EmailNotConfigured where there is no way to send."""
        if self._mailer is None:
            raise EmailNotConfigured()
        return self._mailer

    async def order(self, order: Order) -> None:
        """Write an order down. Raises EmailNotConfigured, EmailBusy."""
        self.require()
        async with self._sessions.begin() as session:
            repository = EmailRepository(session)
            if await repository.count_waiting() >= self._limits.waiting_max:
                raise EmailBusy(retry_after_s=self._limits.retry_base_s)
            await repository.add_order(order, self._clock.now())

    async def send_due(self) -> bool:
        """Carry one order out; whether there was one."""
        mailer = self.require()
        now = self._clock.now()
        async with self._sessions.begin() as session:
            queued = await EmailRepository(session).claim(now, now + 2 * timedelta(seconds=self._limits.send_timeout_s))
        if queued is None:
            return False
        mail = await self._compose(queued.order, now)
        result = "dropped"
        if mail is not None:
            try:
                await mailer.send(mail)
            except MailNotSent as e:
                await self._failed(queued, e, now)
                return True
            result = "sent"
        self._metrics.emails.labels(result).inc()
        async with self._sessions.begin() as session:
            await EmailRepository(session).put_off(queued.id, None)
        return True

    async def issue(self, purpose: Purpose, address: str, account: Account | None, payload: dict[str, str]) -> str:
        """A new token, to be sent, or to be shown by who may."""
        token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        expires_at = self._clock.now() + timedelta(seconds=self._limits.lifetime_s(purpose))
        record = EmailToken(purpose, address, str(account.user_id) if account else None, payload, expires_at)
        async with self._sessions.begin() as session:
            await EmailRepository(session).add_token(digest(token), record)
        return token

    async def prune(self) -> bool:
        """Delete one batch of what is over; whether there may be more."""
        now, batch_max = self._clock.now(), self._limits.prune_batch_max
        async with self._sessions.begin() as session:
            return await EmailRepository(session).prune(now, now - SENT_MEMORY, batch_max) == batch_max

    async def _compose(self, order: Order, now: datetime) -> Mail | None:
        """The message for an order; None where nobody should get one."""
        async with self._sessions() as session:
            account = await AccountRepository(session).find_by_email(order.address)
            sent = await EmailRepository(session).count_sent_to(order.address, now - SENT_MEMORY)
        if sent >= self._limits.per_address_hourly_max:
            return None
        if order.purpose is Purpose.REGISTER:
            if account is not None:
                return taken_mail(account.email)
        elif account is None or account.status is not UserStatus.ACTIVE:
            return None
        address = account.email if account else order.address
        token = await self.issue(order.purpose, address, account, dict(order.payload))
        lifetime_s = self._limits.lifetime_s(order.purpose)
        return token_mail(order.purpose, address, token, link_url=self._limits.link_url, lifetime_s=lifetime_s)

    async def _failed(self, queued: QueuedOrder, error: MailNotSent, now: datetime) -> None:
        given_up = error.permanent or queued.attempts >= self._limits.attempts_max
        pause = timedelta(seconds=self._limits.retry_base_s) * 2 ** (queued.attempts - 1)
        self._metrics.emails.labels("given_up" if given_up else "retried").inc()
        log.warning("email_not_sent", purpose=queued.order.purpose, attempts=queued.attempts, reason=error.detail)
        async with self._sessions.begin() as session:
            await EmailRepository(session).put_off(queued.id, None if given_up else now + pause)


def digest(token: str) -> str:
    """256 random bits: a plain hash is enough at rest."""
    return hashlib.sha256(token.encode()).hexdigest()
