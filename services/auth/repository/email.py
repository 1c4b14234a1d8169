"""E-mails to send, and the tokens in those that were. Of a token there is a SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, insert, select, update

from services.auth.domain.mails import EmailToken, Order, Purpose
from services.auth.tables import EmailOutboxRow, EmailTokenRow
from shared import ids
from shared.database import AsyncSession


@dataclass(frozen=True, slots=True)
class QueuedOrder:
    id: UUID
    order: Order
    attempts: int


class EmailRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add_order(self, order: Order, now: datetime) -> None:
        await self._session.execute(
            insert(EmailOutboxRow).values(
                id=ids.uuid7(),
                purpose=order.purpose.value,
                address=order.address,
                payload=dict(order.payload),
                created_at=now,
                due_at=now,
            )
        )

    async def count_waiting(self) -> int:
        statement = select(func.count()).select_from(EmailOutboxRow).where(EmailOutboxRow.due_at.is_not(None))
        return int((await self._session.execute(statement)).scalar_one())

    async def count_sent_to(self, address: str, since: datetime) -> int:
        """How many orders to an address were carried out since a time, however its letters were written."""
        statement = (
            select(func.count())
            .select_from(EmailOutboxRow)
            .where(
                func.lower(EmailOutboxRow.address) == func.lower(address),
                EmailOutboxRow.due_at.is_(None),
                EmailOutboxRow.created_at >= since,
            )
        )
        return int((await self._session.execute(statement)).scalar_one())

    async def claim(self, now: datetime, until: datetime) -> QueuedOrder | None:
        """An order that is due, put off until a time: a worker that dies gives it to another one then."""
        due = (
            select(EmailOutboxRow.id)
            .where(EmailOutboxRow.due_at <= now)
            .order_by(EmailOutboxRow.due_at)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        statement = (
            update(EmailOutboxRow)
            .where(EmailOutboxRow.id == due)
            .values(due_at=until, attempts=EmailOutboxRow.attempts + 1)
            .returning(EmailOutboxRow)
        )
        row = (await self._session.scalars(statement)).one_or_none()
        if row is None:
            return None
        return QueuedOrder(row.id, Order(Purpose(row.purpose), row.address, row.payload), row.attempts)

    async def put_off(self, order_id: UUID, until: datetime | None) -> None:
        """Until a time, or for good (None): done, or given up. What was in it goes."""
        values: dict[str, object] = {"due_at": until} | ({"payload": {}} if until is None else {})
        await self._session.execute(update(EmailOutboxRow).where(EmailOutboxRow.id == order_id).values(**values))

    async def add_token(self, digest: str, token: EmailToken) -> None:
        await self._session.execute(
            insert(EmailTokenRow).values(
                digest=digest,
                purpose=token.purpose.value,
                address=token.address,
                user_id=UUID(token.user_id) if token.user_id else None,
                payload=dict(token.payload),
                expires_at=token.expires_at,
            )
        )

    async def find_token(self, digest: str, purposes: tuple[Purpose, ...], now: datetime) -> EmailToken | None:
        """As `take_token`, and it stays."""
        statement = select(EmailTokenRow).where(*_standing(digest, purposes, now))
        return _email_token((await self._session.scalars(statement)).one_or_none())

    async def take_token(self, digest: str, purposes: tuple[Purpose, ...], now: datetime) -> EmailToken | None:
        """What a token stands for, which is used up; None for an unknown, used, foreign or expired one."""
        statement = delete(EmailTokenRow).where(*_standing(digest, purposes, now))
        return _email_token((await self._session.scalars(statement.returning(EmailTokenRow))).one_or_none())

    async def remove_tokens_of(self, user_id: UUID) -> None:
        await self._session.execute(delete(EmailTokenRow).where(EmailTokenRow.user_id == user_id))

    async def prune(self, now: datetime, done_before: datetime, batch_max: int) -> int:
        """Delete expired tokens, and orders that were done before a time; at most `batch_max` of each."""
        tokens = select(EmailTokenRow.digest).where(EmailTokenRow.expires_at <= now).limit(batch_max)
        orders = (
            select(EmailOutboxRow.id)
            .where(EmailOutboxRow.due_at.is_(None), EmailOutboxRow.created_at < done_before)
            .limit(batch_max)
        )
        gone_tokens = await self._session.scalars(
            delete(EmailTokenRow).where(EmailTokenRow.digest.in_(tokens)).returning(EmailTokenRow.digest)
        )
        gone_orders = await self._session.scalars(
            delete(EmailOutboxRow).where(EmailOutboxRow.id.in_(orders)).returning(EmailOutboxRow.id)
        )
        return max(len(gone_tokens.all()), len(gone_orders.all()))


def _standing(digest: str, purposes: tuple[Purpose, ...], now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        EmailTokenRow.digest == digest,
        EmailTokenRow.purpose.in_([purpose.value for purpose in purposes]),
        EmailTokenRow.expires_at > now,
    )


def _email_token(row: EmailTokenRow | None) -> EmailToken | None:
    if row is None:
        return None
    user_id = str(row.user_id) if row.user_id else None
    return EmailToken(Purpose(row.purpose), row.address, user_id, row.payload, row.expires_at)
