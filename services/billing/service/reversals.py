"""Money that went back: refunds and lost disputes of a paid top-up take its credits along; an open dispute freezes.

What a provider reports is how a payment stands now, so it may come twice, late and in any order: the ledger is told how
much is to be taken back in all, and takes what is missing. What is not free of the top-up's grant any more is owed.
"""

from __future__ import annotations

from services.billing.ledger.operations import Freeze, TakeBack
from services.billing.ledger.results import TakenBack
from services.billing.ledger.writer import Ledger
from services.billing.payments.port import Dispute, DisputeState, Standing
from services.billing.repository import topups as repository
from services.billing.repository.database import Database
from services.billing.repository.topups import TopUpRow
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)


class Reversals:
    """One for the life of the process."""

    def __init__(self, database: Database, ledger: Ledger, metrics: BillingMetrics) -> None:
        self._database = database
        self._ledger = ledger
        self._metrics = metrics

    async def converge(self, topup: TopUpRow, standing: Standing) -> None:
        """Have the wallet of a paid top-up say what the payment does. Raises LedgerUnavailable; then come again."""
        if standing.currency != topup.currency or topup.money_minor == 0:
            log.error("reversal_of_another_currency", topup_id=str(topup.id), currency=standing.currency)
            return
        lost = sum(d.money_minor for d in standing.disputes if d.state is DisputeState.LOST)
        await self._take_back(topup, min(topup.money_minor, standing.refunded_minor + lost))
        for dispute in standing.disputes:
            if dispute.state is DisputeState.OPEN:
                await self._freeze(topup, dispute, frozen=True, reason=_disputed(topup))
                self._metrics.topups.labels(topup.provider, "disputed").inc()
            elif dispute.state is DisputeState.WON and await self._is_only_reason(topup):
                await self._freeze(topup, dispute, frozen=False, reason=f"The dispute of top-up {topup.id} was won")

    async def _take_back(self, topup: TopUpRow, money_minor: int) -> None:
        total = topup.amount * money_minor // topup.money_minor
        if total == 0:
            return
        taken = await self._ledger.submit(
            TakeBack(
                wallet_id=topup.wallet_id,
                grant_id=topup.id,
                total=total,
                reason=f"Money of top-up {topup.id} went back",
                idempotency_tenant=topup.wallet_id,
                idempotency_key=f"reversal:{topup.id}:{total}",
                author=f"payments:{topup.provider}",
            )
        )
        assert isinstance(taken, TakenBack)
        self._metrics.topups.labels(topup.provider, "reversed").inc()
        log.info("topup_reversed", topup_id=str(topup.id), wallet_id=str(topup.wallet_id), total=total)

    async def _freeze(self, topup: TopUpRow, dispute: Dispute, *, frozen: bool, reason: str) -> None:
        await self._ledger.submit(
            Freeze(
                wallet_id=topup.wallet_id,
                frozen=frozen,
                reason=reason,
                idempotency_tenant=topup.wallet_id,
                idempotency_key=f"dispute:{dispute.id}:{dispute.state}",
                author=f"payments:{topup.provider}",
            )
        )

    async def _is_only_reason(self, topup: TopUpRow) -> bool:
        """Whether nothing but disputes of this top-up keeps the wallet frozen: no operator, no other one, no doubt."""
        return await repository.freezes(self._database, topup.wallet_id) == {
            (f"payments:{topup.provider}", _disputed(topup))
        }


def _disputed(topup: TopUpRow) -> str:
    return f"A payment is disputed: top-up {topup.id}"
