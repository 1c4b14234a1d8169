"""Billing's use cases beside the ledger's own operations: wallets and their history, grants, prices."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from uuid import UUID

import asyncpg

from services.billing.domain import Price, PriceTerms, WalletView, customer_classes
from services.billing.errors import IdempotencyMismatch, PriceOverlap
from services.billing.ledger.operations import GrantCredits, OpenWallet
from services.billing.ledger.results import Granted
from services.billing.ledger.writer import GRANT_PRIORITY, Ledger
from services.billing.repository import history
from services.billing.repository import ledger as ledger_repository
from services.billing.repository import prices as prices_repository
from services.billing.repository.database import Connection, Database
from services.billing.repository.history import TransactionRow, UsageRecord
from shared.errors import InvalidRequest
from shared.ids import uuid7

MANUAL_SOURCE = "manual"


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes, and the idempotency key that they sent."""

    tenant: UUID
    actor: str
    idempotency_key: str

    @property
    def key(self) -> str:
        """Clients' keys have a prefix of their own: they never meet the ledger's."""
        return f"key:{self.idempotency_key}"


class Billing:
    """One for the life of the process."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self._database = database
        self._ledger = ledger

    async def wallet(self, org_id: UUID, user_id: UUID | None = None) -> WalletView:
        """The organisation's wallet, opened when this is the first look at it.

        A person who has had no sign-up credits yet gets them here, unless this wallet has somebody's.
        """
        view = await history.wallet(self._database, org_id)
        if view is None or (user_id is not None and await history.lacks_signup(self._database, org_id, user_id)):
            await self._ledger.submit(OpenWallet(org_id, user_id))
            view = await history.wallet(self._database, org_id)
            assert view is not None, "an opened wallet is there"
        return view

    async def transactions(
        self,
        org_id: UUID,
        *,
        before_seq: int | None,
        kinds: list[str] | None,
        since: datetime | None,
        until: datetime | None,
        limit: int,
    ) -> tuple[list[TransactionRow], int | None]:
        """A page, newest first, and where the next one begins; None at the end."""
        rows = await history.transactions(
            self._database, org_id, before_seq=before_seq, kinds=kinds, since=since, until=until, limit=limit + 1
        )
        return rows[:limit], rows[limit - 1].seq if len(rows) > limit else None

    async def usage(
        self, org_id: UUID, *, before: tuple[UUID, int] | None, limit: int
    ) -> tuple[list[UsageRecord], tuple[UUID, int] | None]:
        """A page, newest first, and where the next one begins; None at the end."""
        rows = await history.usage(self._database, org_id, before=before, limit=limit + 1)
        last = rows[limit - 1] if len(rows) > limit else None
        return rows[:limit], (last.hold_id, last.part) if last else None

    async def grant(
        self, author: Author, org_id: UUID, amount: int, *, reason: str, expires_at: datetime | None
    ) -> Granted:
        """Put credits into a wallet by hand. Idempotent by the author's key."""
        operation = GrantCredits(
            wallet_id=org_id,
            account_id=uuid7(),
            amount=amount,
            source=MANUAL_SOURCE,
            reason=reason,
            priority=GRANT_PRIORITY,
            expires_at=expires_at,
            idempotency_tenant=author.tenant,
            idempotency_key=author.key,
            author=author.actor,
        )
        granted = await self._ledger.submit(operation)
        assert isinstance(granted, Granted)
        return granted


class Prices:
    """What requests cost, and the publication of new prices."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def in_force(self, org_id: UUID | None, plan: str) -> list[Price]:
        """The price that a customer gets for each model now."""
        classes = customer_classes(org_id, plan)
        best: dict[str, Price] = {}
        for price in await prices_repository.in_force(self._database, classes):
            rival = best.get(price.model)
            if rival is None or classes.index(price.customer_class) < classes.index(rival.customer_class):
                best[price.model] = price
        return [best[model] for model in sorted(best)]

    async def publish(
        self, author: Author, model: str, customer_class: str, terms: PriceTerms, effective_from: datetime | None
    ) -> Price:
        """A new version from a time on, now if none is given. Idempotent by the author's key.

        Raises PriceOverlap when another version is scheduled for then or later, InvalidRequest for a time before now.
        """
        body = {"model": model, "class": customer_class, "terms": asdict(terms), "from": effective_from}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).digest()

        async def work(connection: Connection) -> Price:
            now = await ledger_repository.clock(connection)
            price = Price(uuid7(), model, customer_class, terms, effective_from or now)
            result = json.dumps({"id": str(price.id), "valid_from": price.valid_from.isoformat()})
            first = await ledger_repository.claim_operation(
                connection, author.tenant, author.key, "price", digest, result, author.actor
            )
            if not first:
                return await _published(connection, author, digest, price)
            if price.valid_from < now:
                raise InvalidRequest("effective_from lies in the past.", param="effective_from")
            await _insert(connection, price, author.actor)
            return price

        return await self._database.transaction(work)

    async def bring_up_to_date(self, model: str, customer_class: str, terms: PriceTerms, actor: str) -> Price | None:
        """Publish, effective now, unless the price in force says the same: then None. Raises PriceOverlap."""

        async def work(connection: Connection) -> Price | None:
            current = await prices_repository.current(connection, model, customer_class)
            if current is not None and current.terms == terms:
                return None
            now = await ledger_repository.clock(connection)
            price = Price(uuid7(), model, customer_class, terms, now)
            await _insert(connection, price, actor)
            return price

        return await self._database.transaction(work)


async def _insert(connection: Connection, price: Price, actor: str) -> None:
    try:
        await prices_repository.insert(connection, price, actor)
    except asyncpg.ExclusionViolationError as e:
        raise PriceOverlap() from e


async def _published(connection: Connection, author: Author, digest: bytes, price: Price) -> Price:
    remembered = await ledger_repository.find_operation(connection, author.tenant, [author.key])
    assert remembered is not None, "a claimed key is there"
    if remembered.body_sha256 != digest:
        raise IdempotencyMismatch()
    fields = json.loads(remembered.result)
    return replace(price, id=UUID(fields["id"]), valid_from=datetime.fromisoformat(fields["valid_from"]))
