"""Stripe Checkout, by Stripe's own library.

One top-up is one Checkout Session, made with the top-up's id as idempotency key and as `client_reference_id`, so that
a session is found again from either side. https://docs.stripe.com/api/checkout/sessions,
https://docs.stripe.com/webhooks#verify-events, https://docs.stripe.com/api/idempotent_requests
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import aiohttp
import stripe

from services.billing.errors import InvalidSignature, PaymentRefused, PaymentUnavailable
from services.billing.payments.port import (
    Checkout,
    Dispute,
    DisputeState,
    MoneyMoved,
    Order,
    PaymentReport,
    PaymentState,
    Standing,
)
from shared.errors import InvalidRequest
from shared.money import format_credits
from shared.telemetry import get_logger

log = get_logger(__name__)

SIGNATURE_TOLERANCE_S = 300
NOT_FOUND = 404
# Of the many kinds of events, those that change what a top-up's payment comes to.
EVENTS = frozenset(
    (
        "checkout.session.completed",
        "checkout.session.async_payment_succeeded",
        "checkout.session.async_payment_failed",
        "checkout.session.expired",
    )
)

# Of charges, refunds and disputes, which all name their payment intent. Stripe promises no order of them, so what
# counts is not what they say but how the payment stands when one comes.
MOVED = ("charge.refunded", "charge.refund.", "refund.", "charge.dispute.")
DISPUTES_MAX = 100
_ENDED = {"won": DisputeState.WON, "lost": DisputeState.LOST, "prevented": DisputeState.WON}
_INQUIRY = "warning_"  # no money moves

UNUSABLE = (stripe.StripeError, aiohttp.ClientError, TimeoutError)  # the library lets through what breaks a body


@dataclass(frozen=True, slots=True)
class StripeAccount:
    """`return_url` is where customers come back to; `api_url` is Stripe's, or that of a double of it."""

    secret_key: str
    webhook_secret: str
    api_url: str
    return_url: str
    timeout_s: float
    retries_max: int


class StripePayments:
    """The provider `stripe`."""

    name = "stripe"

    def __init__(self, account: StripeAccount) -> None:
        self._account = account
        self._http = stripe.AIOHTTPClient(timeout=aiohttp.ClientTimeout(total=account.timeout_s))
        self._client = stripe.StripeClient(
            account.secret_key,
            http_client=self._http,
            base_addresses={"api": account.api_url},
            max_network_retries=account.retries_max,
        )

    async def open_checkout(self, order: Order) -> Checkout:
        """See the port. The library itself tries again with the same idempotency key."""
        names = {"topup_id": str(order.topup_id), "org_id": str(order.org_id)}
        params: Any = {
            "mode": "payment",
            "client_reference_id": str(order.topup_id),
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {
                        "currency": order.currency,
                        "unit_amount": order.money_minor,
                        "product_data": {"name": f"{format_credits(order.amount)} credits"},
                    },
                }
            ],
            "metadata": names,
            "payment_intent_data": {"metadata": names},
            "success_url": self._account.return_url,
            "cancel_url": self._account.return_url,
        }
        options: Any = {"idempotency_key": str(order.topup_id)}
        try:
            session = await self._client.v1.checkout.sessions.create_async(params, options)
        except UNUSABLE as e:
            raise _unusable(e) from e
        report = _report(session.to_dict())
        return Checkout(report.session_id, session.url, report.state)

    async def look_up(self, order: Order, session_id: str) -> PaymentReport:
        """See the port."""
        try:
            session = await self._client.v1.checkout.sessions.retrieve_async(session_id)
        except UNUSABLE as e:
            raise _unusable(e) from e
        return _report(session.to_dict())

    async def standing(self, payment_id: str) -> Standing | None:
        """See the port. The intent has the top-up's id in its metadata."""
        try:
            intent = await self._client.v1.payment_intents.retrieve_async(payment_id, {"expand": ["latest_charge"]})
            disputes = await self._client.v1.disputes.list_async({"payment_intent": payment_id, "limit": DISPUTES_MAX})
        except stripe.InvalidRequestError as e:
            if e.http_status == NOT_FOUND:
                return None
            raise _unusable(e) from e
        except UNUSABLE as e:
            raise _unusable(e) from e
        found = intent.to_dict()
        topup_id = _uuid((found.get("metadata") or {}).get("topup_id"))
        charge = found.get("latest_charge")
        if topup_id is None or not isinstance(charge, dict):
            return None
        return Standing(
            topup_id,
            str(charge.get("currency") or ""),
            int(charge.get("amount_refunded") or 0),
            tuple(_dispute(d) for d in disputes.to_dict()["data"] if not str(d.get("status")).startswith(_INQUIRY)),
        )

    def read_event(self, payload: bytes, signature: str) -> PaymentReport | MoneyMoved | None:
        """See the port."""
        try:
            stripe.WebhookSignature.verify_header(
                payload, signature, self._account.webhook_secret, SIGNATURE_TOLERANCE_S
            )
            event = json.loads(payload)
        except (stripe.SignatureVerificationError, UnicodeDecodeError) as e:
            raise InvalidSignature() from e
        except ValueError as e:
            raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from e
        if not isinstance(event, dict):
            return None
        session = event.get("data", {}).get("object", {})
        if str(event.get("type")).startswith(MOVED):
            payment_id = session.get("payment_intent")
            return MoneyMoved(payment_id) if isinstance(payment_id, str) else None
        if event.get("type") not in EVENTS:
            return None
        if _topup_id(session) is None:
            return None  # a session that somebody else made under the same account
        report = _report(session)
        if event["type"] == "checkout.session.async_payment_failed":
            return PaymentReport(
                report.topup_id, report.session_id, PaymentState.FAILED, report.currency, report.money_minor
            )
        return report

    async def close(self) -> None:
        """Close the library's connections."""
        await self._http.close_async()  # type: ignore[no-untyped-call]


def _report(session: dict[str, Any]) -> PaymentReport:
    topup_id = _topup_id(session)
    if topup_id is None:
        raise PaymentUnavailable(detail="the provider answered with a session that is not ours")
    state = PaymentState.OPEN
    if session.get("payment_status") == "paid":
        state = PaymentState.PAID
    elif session.get("status") == "expired":
        state = PaymentState.FAILED
    return PaymentReport(
        topup_id,
        str(session.get("id")),
        state,
        str(session.get("currency") or ""),
        int(session.get("amount_total") or 0),
    )


def _dispute(found: dict[str, Any]) -> Dispute:
    state = _ENDED.get(str(found.get("status")), DisputeState.OPEN)
    return Dispute(str(found.get("id")), state, int(found.get("amount") or 0))


def _topup_id(session: dict[str, Any]) -> UUID | None:
    return _uuid(session.get("client_reference_id"))


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(str(value))
    except ValueError:
        return None


def _unusable(error: Exception) -> PaymentRefused | PaymentUnavailable:
    """Stripe's messages may quote what was sent: only their class and code go on, and those into the log alone."""
    detail = type(error).__name__
    if isinstance(error, stripe.StripeError):
        detail = f"{detail} {error.code or ''} {error.http_status or ''}".strip()
    if isinstance(error, stripe.InvalidRequestError | stripe.CardError):
        return PaymentRefused(detail=detail)
    if isinstance(error, stripe.AuthenticationError | stripe.PermissionError):
        log.error("payment_provider_refuses_us", detail=detail)
    return PaymentUnavailable(detail=detail, retry_after_s=5)
