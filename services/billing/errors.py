"""What billing refuses, by code. A refusal of the ledger is remembered by its code and raised again from it."""

from __future__ import annotations

from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PaymentRequired,
    PermissionDenied,
    RateLimited,
    TollgateError,
    Unavailable,
    Unprocessable,
)


class InsufficientCredits(PaymentRequired):
    """The wallet would not cover this even if nothing else were in flight."""

    default_code = "insufficient_quota"
    default_message = "The wallet has not enough credits for this request. Add credits, or lower max_tokens."


class CreditsReserved(PaymentRequired):
    """The wallet would cover this once requests in flight have given back what they reserve."""

    default_code = "credits_reserved"
    default_message = "The wallet's credits are reserved by requests in flight. Retry when they have finished."


class BudgetExceeded(PaymentRequired):
    """The key, or the member, would spend more in the day or the month than its budget allows."""

    default_code = "budget_exceeded"
    default_message = "This would exceed the budget of this key or member. Raise the budget, or lower max_tokens."


class WalletFrozen(PermissionDenied):
    default_code = "wallet_frozen"
    default_message = "This wallet is frozen. Ask the operator."


class WalletNotFound(NotFound):
    default_code = "wallet_not_found"
    default_message = "This organisation has no wallet yet: it opens with the first request or look at it."


class ModelNotPriced(NotFound):
    default_code = "model_not_priced"
    default_message = "This model has no price, so it cannot be used yet."


class HoldNotFound(NotFound):
    default_code = "hold_not_found"
    default_message = "There is no hold of this id in this wallet."


class HoldResolved(Conflict):
    default_code = "hold_resolved"
    default_message = "This hold was resolved before, in another way; the first resolution stands."


class HoldNotExpired(Conflict):
    default_code = "hold_not_expired"
    default_message = "This hold has not expired yet."


class NothingToRefund(NotFound):
    default_code = "nothing_to_refund"
    default_message = "Nothing was taken from this wallet under that id, or all of it was refunded."


class RefundTooLarge(Unprocessable):
    default_code = "refund_too_large"
    default_message = "A refund is not more than what was taken, less earlier refunds."


class IdempotencyMismatch(Unprocessable):
    default_code = "idempotency_mismatch"
    default_message = "This idempotency key was used before with another body. Use a new key for a new request."


class PriceOverlap(Conflict):
    default_code = "price_overlap"
    default_message = "Another version of this price is in force or scheduled after that time."


class TooManyExports(RateLimited):
    default_code = "too_many_exports"
    default_message = "Too many exports are under way. Retry in a few seconds."


class OwnBudget(PermissionDenied):
    default_code = "own_budget"
    default_message = "A key cannot change its own budget. Use an access token, or another key."


class TooManyBudgets(Conflict):
    default_code = "too_many_budgets"
    default_message = "A wallet has at most a thousand budgets. Remove one first."


class TopUpNotFound(NotFound):
    default_code = "topup_not_found"
    default_message = "There is no top-up of this id in this wallet."


class PaymentsNotOffered(NotFound):
    default_code = "payments_not_offered"
    default_message = "Credits cannot be bought this way here. Ask the operator."


class ReferenceUsed(Conflict):
    default_code = "reference_used"
    default_message = "Another top-up has this reference: the same payment is not credited twice."


class PaymentRefused(Unprocessable):
    default_code = "payment_refused"
    default_message = "The payment provider refused this top-up. Try another amount, or ask the operator."


class PaymentUnavailable(Unavailable):
    """Nobody knows what came of it: the same request again finds out."""

    default_code = "payment_provider_unavailable"
    default_message = "The payment provider does not answer right now. Retry with the same Idempotency-Key."


class WebhooksNotOffered(NotFound):
    default_code = "webhooks_not_offered"
    default_message = "Webhooks are not set up here. Ask the operator."


class WebhookNotFound(NotFound):
    default_code = "webhook_not_found"
    default_message = "There is no webhook of this id in this wallet."


class WebhookDisabled(Conflict):
    default_code = "webhook_disabled"
    default_message = "Nothing is delivered to this webhook. Enable it first."


class TooManyEndpoints(Conflict):
    default_code = "too_many_webhooks"
    default_message = "A wallet has at most ten webhooks. Remove one first."


class UnsafeDestination(InvalidRequest):
    default_code = "unsafe_destination"
    default_message = "A webhook goes to a public address by https, without user, password or fragment."


class InvoiceNotFound(NotFound):
    default_code = "invoice_not_found"
    default_message = "There is no invoice of that month: it is not over, or was before the wallet."


class InvalidSignature(InvalidRequest):
    default_code = "invalid_signature"
    default_message = "The signature does not match this body, or is too old."


class AmountTooLarge(InvalidRequest):
    default_code = "invalid_request"
    default_message = "The amount is larger than the ledger can hold."


class ExpiryInPast(InvalidRequest):
    default_code = "expiry_in_past"
    default_message = "expires_at lies in the past."


class IdempotencyKeyRequired(InvalidRequest):
    default_code = "idempotency_key_required"
    default_message = "Send an Idempotency-Key header of 1 to 255 printable characters, new for each request."


class LedgerUnavailable(Unavailable):
    """No database, or too much waiting: nothing was applied, or the same id finds out what was."""

    default_code = "billing_unavailable"
    default_message = "Billing is not available right now. Retry."


REFUSALS: dict[str, type[TollgateError]] = {
    cls.default_code: cls
    for cls in (
        InsufficientCredits,
        CreditsReserved,
        BudgetExceeded,
        WalletFrozen,
        ModelNotPriced,
        HoldResolved,
        RefundTooLarge,
        IdempotencyMismatch,
        AmountTooLarge,
        ExpiryInPast,
    )
}
"""The refusals that are remembered. A hold that is not there, or not expired, may be so the next moment."""

REFUSALS_BY_CODE: dict[str, type[TollgateError]] = {
    **REFUSALS,
    **{cls.default_code: cls for cls in (HoldNotFound, HoldNotExpired, NothingToRefund)},
}
"""What the ledger of another process may answer."""
