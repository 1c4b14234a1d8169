"""Credits in and out of a wallet without a hold: pure, like the kernel, of which this is a part."""

from __future__ import annotations

from uuid import UUID

from services.billing.domain import INT8_MAX
from services.billing.errors import (
    AmountTooLarge,
    BudgetExceeded,
    CreditsReserved,
    ExpiryInPast,
    InsufficientCredits,
    NothingToRefund,
    RefundTooLarge,
    WalletFrozen,
)
from services.billing.ledger.book import Account, Book, Draw, Journal
from services.billing.ledger.cover import CREDITS_RESERVED_RETRY_S, room_of
from services.billing.ledger.operations import GRANT_PRIORITY, Charge, ExpireGrant, GrantCredits, Refund, TakeBack
from services.billing.ledger.results import Charged, Granted, GrantExpired, Refunded, TakenBack
from services.billing.ledger.rows import AuditRow, ChargeDay

REFUND_SOURCE = "refund"


def grant(journal: Journal, book: Book, op: GrantCredits) -> Granted:
    """New credits; they pay what is owed first. Raises AmountTooLarge, ExpiryInPast."""
    funding = book.accounts["funding"]
    if not 0 < op.amount <= INT8_MAX - funding.debits_posted:
        raise AmountTooLarge()
    if op.expires_at is not None and op.expires_at <= journal.now:
        raise ExpiryInPast(param="expires_at")
    made = book.add_grant(
        journal,
        op.account_id,
        priority=op.priority,
        expires_at=op.expires_at,
        source=op.source,
        reason=op.reason,
    )
    book.post(journal, funding, made.account, op.amount, "grant")
    tidy(journal, book)
    return Granted(op.account_id, op.amount, book.available(journal.now), book.owed)


def expire_grant(journal: Journal, book: Book, op: ExpireGrant) -> GrantExpired:
    """What is left of it and not held goes to breakage."""
    found = book.grants.get(op.account_id)
    amount = found.account.free if found is not None and found.is_expired(journal.now) else 0
    journal.rows.expired_grants.append(op.account_id)
    tidy(journal, book)
    return GrantExpired(amount)


def charge(journal: Journal, book: Book, op: Charge) -> Charged:
    """Take the amount, whole, in the order in which grants are drawn, within the budgets of whoever takes it.

    Raises the refusals of a hold.
    """
    if book.is_frozen:
        raise WalletFrozen()
    revenue, now = book.accounts["revenue"], journal.now
    if not 0 < op.amount <= INT8_MAX - revenue.credits_posted:
        raise AmountTooLarge()
    if book.owed > 0 or op.amount > book.reachable(now):
        raise InsufficientCredits()
    if op.amount > book.available(now):
        raise CreditsReserved(retry_after_s=CREDITS_RESERVED_RETRY_S)
    spendings = book.spendings(op.key_id, op.user_id)
    if op.amount > room_of(spendings, journal):
        raise BudgetExceeded()
    for part in book.draw(op.amount, now):
        account = book.grants[part.account_id].account
        book.post(journal, account, revenue, part.amount, "charge", hold_id=op.charge_id)
    for spending in spendings:
        spending.add(op.amount, journal.today)
    day = ChargeDay(book.wallet_id, journal.today, op.key_id, op.user_id)
    journal.rows.charges[day] = journal.rows.charges.get(day, 0) + op.amount
    _note(journal, book, op, op.amount)
    return Charged(op.charge_id, op.amount, book.available(now))


def refund(journal: Journal, book: Book, op: Refund) -> Refunded:
    """Unwind draws, the last one first. Raises NothingToRefund, RefundTooLarge.

    `book.draws` has the source's transfers, and `book.grants` the grants that they name, spent ones included.
    """
    draws = [draw for draw in book.draws.get(op.source_id, ()) if draw.code != "reversal"]
    refundable = sum(-draw.amount if draw.code == "refund" else draw.amount for draw in draws)
    if refundable == 0:
        raise NothingToRefund()
    amount = refundable if op.amount is None else op.amount
    if not 0 < amount <= refundable:
        raise RefundTooLarge()
    revenue = book.accounts["revenue"]
    fresh = 0
    for account_id, part in _unwound(draws, amount):
        account, forgiven = _account(book, account_id), part
        if account.kind == "receivable":
            forgiven = min(part, book.owed)
            fresh += part - forgiven
        if forgiven > 0:
            book.post(journal, revenue, account, forgiven, "refund", hold_id=op.source_id)
    if fresh > 0:
        made = book.add_grant(
            journal,
            op.account_id,
            priority=GRANT_PRIORITY,
            expires_at=None,
            source=REFUND_SOURCE,
            reason=op.reason,
        )
        book.post(journal, revenue, made.account, fresh, "refund", hold_id=op.source_id)
    tidy(journal, book)
    _note(journal, book, op, amount)
    return Refunded(amount, refundable - amount, book.owed, book.available(journal.now))


def take_back(journal: Journal, book: Book, op: TakeBack) -> TakenBack:
    """What is free of the grant goes back to funding, and the rest is owed to it.

    `book.draws` has what was taken back of the grant before. Raises AmountTooLarge.
    """
    before = sum(draw.amount for draw in book.draws.get(op.grant_id, ()) if draw.code == "reversal")
    amount = max(0, op.total - before)
    funding, receivable = book.accounts["funding"], book.accounts["receivable"]
    if max(funding.credits_posted, receivable.debits_posted) > INT8_MAX - amount:
        raise AmountTooLarge()
    found = book.grants.get(op.grant_id)
    free = min(amount, found.account.free) if found is not None else 0
    if found is not None and free > 0:
        book.post(journal, found.account, funding, free, "reversal", hold_id=op.grant_id)
    if amount > free:
        book.post(journal, receivable, funding, amount - free, "reversal", hold_id=op.grant_id)
    tidy(journal, book)
    if amount > 0:
        _note(journal, book, op, amount)
    return TakenBack(amount, before + amount, book.owed, book.available(journal.now))


def tidy(journal: Journal, book: Book) -> None:
    """Free credits of expired grants go to breakage; other free credits pay what is owed."""
    for grant in book.order:
        if grant.expires_at is not None and grant.expires_at <= journal.now and grant.account.free > 0:
            breakage = book.accounts["breakage"]
            book.post(journal, grant.account, breakage, grant.account.free, "expiry", effective_at=grant.expires_at)
    if book.owed > 0:
        for part in book.draw(book.owed, journal.now):
            account, receivable = book.grants[part.account_id].account, book.accounts["receivable"]
            book.post(journal, account, receivable, part.amount, "repayment")


def _note(journal: Journal, book: Book, op: Charge | Refund | TakeBack, amount: int) -> None:
    journal.rows.audit.append(
        AuditRow(book.wallet_id, journal.op_id, op.kind, amount, None, op.reason, op.actor, journal.now)
    )


def _unwound(draws: list[Draw], amount: int) -> list[tuple[UUID, int]]:
    """From whom to take back `amount`: from the last draw on, of what earlier refunds have left."""
    left: list[tuple[UUID, int]] = []
    for draw in draws:
        if draw.code == "refund":  # in its place: a settlement that came late may have drawn after it
            _pop(left, draw.amount)
        else:
            left.append((draw.account_id, draw.amount))
    return _pop(left, amount)


def _pop(left: list[tuple[UUID, int]], amount: int) -> list[tuple[UUID, int]]:
    parts = []
    while amount > 0:
        account_id, most = left.pop()
        part = min(most, amount)
        if part < most:
            left.append((account_id, most - part))
        amount -= part
        parts.append((account_id, part))
    return parts


def _account(book: Book, account_id: UUID) -> Account:
    receivable = book.accounts["receivable"]
    return receivable if account_id == receivable.id else book.grants[account_id].account
