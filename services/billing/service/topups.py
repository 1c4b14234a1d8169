"""Top-ups: credits for money.

    written down as pending, COMMIT → the provider is asked, in no transaction → credited and marked, one transaction

Failure modes:
- The provider times out after it did what was asked: the same top-up asks again with the same key, by the customer's
  retry or by `watch`, and finds the session that was made.
- A webhook is lost: `watch` asks how the payment stands. It comes twice: the ledger's operation is `topup:<id>`, once
  for ever, and its grant's id is the top-up's, so that it was credited and that it is paid is one row. It comes in the
  wrong order: paid wins over failed, whatever came first.
- The ledger is away: the webhook is answered with 503 and comes again, and `watch` asks anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from services.billing.domain import INT8_MAX
from services.billing.errors import (
    PaymentsNotOffered,
    PaymentUnavailable,
    ReferenceUsed,
    TopUpNotFound,
)
from services.billing.ledger.operations import GRANT_PRIORITY, GrantCredits, OpenWallet
from services.billing.ledger.writer import Ledger
from services.billing.payments.port import MoneyMoved, Order, PaymentProvider, PaymentReport, PaymentState
from services.billing.repository import topups as repository
from services.billing.repository.database import Connection, Database
from services.billing.repository.topups import TopUpRow
from services.billing.service.author import Author, once
from services.billing.service.reversals import Reversals
from shared.clock import Clock
from shared.errors import InvalidRequest, TollgateError
from shared.ids import uuid7
from shared.money import NANO_PER_CREDIT, format_credits
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)

SOURCE = "topup"
WATCHED_AT_ONCE = 50
# Providers forget idempotency keys after a day: past this, asking again would open a second payment.
SESSION_OPENS_WITHIN = timedelta(hours=20)
PAYMENT_TAKES_AT_MOST = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class TopUpTerms:
    """What credits cost: nano-units of the currency's smallest unit for one credit; and how many at once."""

    currency: str
    minor_nano_per_credit: int
    amount_min: int
    amount_max: int

    def money_minor(self, amount: int) -> int:
        """What an amount of nano-credits costs. Raises InvalidRequest for parts of the currency's smallest unit."""
        money, rest = divmod(amount * self.minor_nano_per_credit, NANO_PER_CREDIT**2)
        if rest or money > INT8_MAX:
            raise InvalidRequest(f"That many credits cost a fraction of a unit of {self.currency}.", param="credits")
        return money

    def check(self, amount: int) -> None:
        """Raise InvalidRequest for less or more than customers may buy at once."""
        if not self.amount_min <= amount <= self.amount_max:
            least, most = format_credits(self.amount_min), format_credits(self.amount_max)
            raise InvalidRequest(f"A top-up is from {least} to {most} credits.", param="credits")


class TopUps:
    """One for the life of the process."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        providers: Mapping[str, PaymentProvider],
        terms: TopUpTerms,
        clock: Clock,
        metrics: BillingMetrics,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._providers = providers
        self._terms = terms
        self._clock = clock
        self._metrics = metrics
        self._reversals = Reversals(database, ledger, metrics)
        self._advancing: dict[UUID, asyncio.Task[None]] = {}

    async def start(
        self, author: Author, org_id: UUID, amount: int, *, provider: str, reference: str | None = None
    ) -> TopUpRow:
        """Order credits; the row tells where to pay. The same key again finds the same top-up, as it stands then.

        `reference` is the provider's own where it has one before it is asked: a bank transfer belongs to one top-up.
        Raises PaymentsNotOffered, ReferenceUsed, PaymentUnavailable (the top-up is there; ask again), PaymentRefused.
        """
        if provider not in self._providers:
            raise PaymentsNotOffered()
        if reference is None:
            self._terms.check(amount)
        money = self._terms.money_minor(amount)
        await self._ledger.submit(OpenWallet(org_id))
        topup = self._pending(author, org_id, amount, money, provider, reference)
        body = {"org": org_id, "amount": amount, "provider": provider, "reference": reference}

        async def work(connection: Connection) -> dict[str, object]:
            if await repository.reference_is_taken(connection, provider, topup.provider_ref):
                raise ReferenceUsed()
            await repository.insert(connection, topup)
            return {"topup_id": topup.id}

        written = await once(self._database, author, "topup", body, work)
        return await self._advanced(UUID(written["topup_id"]))

    async def get(self, org_id: UUID, topup_id: UUID) -> TopUpRow:
        """One of this wallet's. Raises TopUpNotFound."""
        topup = await repository.find(self._database, topup_id)
        if topup is None or topup.wallet_id != org_id:
            raise TopUpNotFound()
        return topup

    async def page(self, org_id: UUID, *, before: UUID | None, limit: int) -> tuple[list[TopUpRow], UUID | None]:
        """Newest first, and where the next page begins; None at the end."""
        rows = await repository.page(self._database, org_id, before, limit + 1)
        return rows[:limit], rows[limit - 1].id if len(rows) > limit else None

    async def receive(self, provider: str, payload: bytes, signature: str) -> None:
        """A webhook: when this returns, what it says is durable.

        Raises InvalidSignature; LedgerUnavailable and PaymentUnavailable, after which it comes again.
        """
        if provider not in self._providers:
            raise PaymentsNotOffered()
        report = self._providers[provider].read_event(payload, signature)
        if isinstance(report, MoneyMoved):
            await self._reverse(self._providers[provider], report.payment_id)
            return
        if report is None:
            return
        topup = await repository.find(self._database, report.topup_id)
        if topup is None or topup.provider != provider:
            log.warning("payment_for_unknown_topup", provider=provider, topup_id=str(report.topup_id))
            return
        await self._apply(topup, report)

    async def watch(self, interval_s: float, unchecked_s: float) -> None:
        """Ask about payments that nobody has reported, for ever."""
        while True:
            for topup in await repository.lease_unsettled(self._database, unchecked_s, WATCHED_AT_ONCE):
                try:
                    await self._advanced(topup.id)
                except TollgateError as e:
                    log.warning("topup_not_settled", topup_id=str(topup.id), code=e.code, detail=e.detail)
            await asyncio.sleep(interval_s)

    async def _reverse(self, provider: PaymentProvider, payment_id: str) -> None:
        """Have a top-up follow its payment's money; it may be the first that is heard of the payment."""
        standing = await provider.standing(payment_id)
        topup = await repository.find(self._database, standing.topup_id) if standing is not None else None
        if standing is None or topup is None or topup.provider != provider.name:
            return
        if topup.status != "paid":
            if topup.session_id is not None:
                await self._apply(topup, await provider.look_up(_order(topup), topup.session_id))
            topup = await self.get(topup.wallet_id, topup.id)
        if topup.status == "paid":
            await self._reversals.converge(topup, standing)
        elif topup.status == "pending":
            raise PaymentUnavailable(detail="money of a payment moved that is not paid yet")

    def _pending(
        self, author: Author, org_id: UUID, amount: int, money: int, provider: str, reference: str | None
    ) -> TopUpRow:
        topup_id, now = uuid7(), self._clock.now()
        return TopUpRow(
            id=topup_id,
            wallet_id=org_id,
            provider=provider,
            provider_ref=reference or str(topup_id),
            amount=amount,
            currency=self._terms.currency,
            money_minor=money,
            status="pending",
            failure=None,
            session_id=None,
            checkout_url=None,
            requested_by=author.actor,
            created_at=now,
            updated_at=now,
        )

    async def _advanced(self, topup_id: UUID) -> TopUpRow:
        """The top-up after the next step, if there is one to take. Those who ask meanwhile wait for the same step."""
        task = self._advancing.get(topup_id)
        if task is None:
            task = asyncio.create_task(self._advance(topup_id))
            self._advancing[topup_id] = task
            task.add_done_callback(lambda _: self._advancing.pop(topup_id))
        await asyncio.shield(task)
        topup = await repository.find(self._database, topup_id)
        assert topup is not None, "a top-up is never removed"
        return topup

    async def _advance(self, topup_id: UUID) -> None:
        topup = await repository.find(self._database, topup_id)
        if topup is None or topup.status == "failed":
            return
        if topup.status == "paid":
            await repository.mark_paid(self._database, topup.id)
            return
        provider = self._providers.get(topup.provider)
        if provider is None:
            raise PaymentUnavailable(detail=f"{topup.provider} is not configured any more")
        age = self._clock.now() - topup.created_at
        order = _order(topup)
        if topup.session_id is None:
            if age > SESSION_OPENS_WITHIN:
                await repository.mark_failed(self._database, topup.id, "no session could be opened")
                return
            checkout = await provider.open_checkout(order)
            await repository.keep_session(self._database, topup.id, checkout.session_id, checkout.url)
            money = (order.currency, order.money_minor)
            await self._apply(topup, PaymentReport(topup.id, checkout.session_id, checkout.state, *money))
            return
        report = await provider.look_up(order, topup.session_id)
        await self._apply(topup, report)
        if report.state is PaymentState.OPEN and age > PAYMENT_TAKES_AT_MOST:
            await repository.mark_failed(self._database, topup.id, "not paid in time")

    async def _apply(self, topup: TopUpRow, report: PaymentReport) -> None:
        if report.state is PaymentState.OPEN or topup.status == "paid":
            return
        if report.state is PaymentState.FAILED:
            await repository.mark_failed(self._database, topup.id, "not paid")
            self._metrics.topups.labels(topup.provider, "failed").inc()
            return
        if (report.currency, report.money_minor) != (topup.currency, topup.money_minor):
            log.error("payment_of_another_amount", topup_id=str(topup.id), currency=report.currency)
            self._metrics.topups.labels(topup.provider, "mismatch").inc()
            await repository.mark_failed(self._database, topup.id, "paid another amount: ask the operator")
            return
        await self._ledger.submit(
            GrantCredits(
                wallet_id=topup.wallet_id,
                account_id=topup.id,
                amount=topup.amount,
                source=SOURCE,
                reason=f"Top-up by {topup.provider}",
                priority=GRANT_PRIORITY,
                expires_at=None,
                idempotency_tenant=topup.wallet_id,
                idempotency_key=f"topup:{topup.id}",
                author=f"payments:{topup.provider}",
            )
        )
        await repository.mark_paid(self._database, topup.id)
        self._metrics.topups.labels(topup.provider, "paid").inc()
        log.info("topup_paid", topup_id=str(topup.id), wallet_id=str(topup.wallet_id), provider=topup.provider)


def _order(topup: TopUpRow) -> Order:
    return Order(topup.id, topup.wallet_id, topup.amount, topup.currency, topup.money_minor)
