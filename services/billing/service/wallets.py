"""Wallets: what is in them, and what operators and customers do to them by hand."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from services.billing.domain import WalletView
from services.billing.errors import WalletNotFound
from services.billing.ledger.operations import GRANT_PRIORITY, Charge, Freeze, GrantCredits, OpenWallet, Refund
from services.billing.ledger.results import Charged, Frozen, Granted, Refunded
from services.billing.ledger.writer import Ledger
from services.billing.repository import history
from services.billing.repository import wallets as repository
from services.billing.repository.database import Database
from services.billing.repository.wallets import BalanceAt, GrantView
from services.billing.service.author import Author
from shared.errors import InvalidRequest
from shared.ids import uuid7

MANUAL_SOURCE = "manual"


class Wallets:
    """One for the life of the process. Every write is idempotent by its author's key, and durable when it returns."""

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

    async def existing(self, org_id: UUID) -> WalletView:
        """A wallet that somebody else looks at: it is not opened by that. Raises WalletNotFound."""
        view = await history.wallet(self._database, org_id)
        if view is None:
            raise WalletNotFound()
        return view

    async def balance_at(self, org_id: UUID, at: datetime | None) -> BalanceAt:
        """What was left of the wallet's credits at a time, held ones included; now if none is given.

        Raises InvalidRequest for a time that is not over yet.
        """
        found = await repository.balance_at(self._database, org_id, at)
        if found is None:
            raise InvalidRequest("at lies in the future.", param="at")
        return found

    async def grants(self, org_id: UUID, *, all_of_them: bool, limit: int) -> list[GrantView]:
        """Grants in the order in which they are drawn; those with nothing left only if asked for."""
        return await repository.grants(self._database, org_id, all_of_them=all_of_them, limit=limit)

    async def grant(
        self, author: Author, org_id: UUID, amount: int, *, reason: str, expires_at: datetime | None
    ) -> Granted:
        """Put credits into a wallet by hand."""
        granted = await self._ledger.submit(
            GrantCredits(
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
        )
        assert isinstance(granted, Granted)
        return granted

    async def charge(self, author: Author, org_id: UUID, amount: int, *, reason: str) -> Charged:
        """Take an amount at once, whole or not at all, within the budgets of the author's key and of the author."""
        charged = await self._ledger.submit(
            Charge(
                wallet_id=org_id,
                charge_id=uuid7(),
                amount=amount,
                reason=reason,
                user_id=author.user_id,
                key_id=author.key_id,
                idempotency_tenant=author.tenant,
                idempotency_key=author.key,
                author=author.actor,
            )
        )
        assert isinstance(charged, Charged)
        return charged

    async def refund(
        self, author: Author, org_id: UUID, source_id: UUID, amount: int | None, *, reason: str
    ) -> Refunded:
        """Give back what a request (its hold) or a charge took, or a part of it; all that is left without an amount."""
        refunded = await self._ledger.submit(
            Refund(
                wallet_id=org_id,
                source_id=source_id,
                account_id=uuid7(),
                amount=amount,
                reason=reason,
                idempotency_tenant=author.tenant,
                idempotency_key=author.key,
                author=author.actor,
            )
        )
        assert isinstance(refunded, Refunded)
        return refunded

    async def freeze(self, author: Author, org_id: UUID, *, frozen: bool, reason: str) -> Frozen:
        """Stop new holds and charges of a wallet, or allow them again. What is in flight is settled either way."""
        await self.existing(org_id)
        result = await self._ledger.submit(
            Freeze(
                wallet_id=org_id,
                frozen=frozen,
                reason=reason,
                idempotency_tenant=author.tenant,
                idempotency_key=author.key,
                author=author.actor,
            )
        )
        assert isinstance(result, Frozen)
        return result
