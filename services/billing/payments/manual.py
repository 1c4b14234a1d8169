"""Money that an operator has received some other way: by bank transfer, on an invoice, in cash."""

from __future__ import annotations

from services.billing.errors import InvalidSignature
from services.billing.payments.port import Checkout, Order, PaymentReport, PaymentState, Standing


class ManualPayments:
    """Paid as soon as it is written down. The reference is the operator's, and belongs to one top-up."""

    name = "manual"

    async def open_checkout(self, order: Order) -> Checkout:
        return Checkout(str(order.topup_id), None, PaymentState.PAID)

    async def look_up(self, order: Order, session_id: str) -> PaymentReport:
        return PaymentReport(order.topup_id, session_id, PaymentState.PAID, order.currency, order.money_minor)

    async def standing(self, payment_id: str) -> Standing | None:
        """Operators take back by hand."""
        return None

    def read_event(self, payload: bytes, signature: str) -> PaymentReport | None:
        """Nobody reports for operators."""
        raise InvalidSignature()

    async def close(self) -> None:
        return None
