"""The ledger's decisions, pure: a book and an operation in; the result out, and the rows to write in the journal.

A refusal is raised before anything is changed. The rules:
- A hold reserves the worst case, from grants that are not expired, by priority, expiry, id, within the budgets of its
  key and member.
- An extension reserves more for more output tokens, by the same rules: all that is asked for or as much as there is,
  at least one token more.
- A settlement takes the hold first, in the order in which it was reserved; what was used beyond it from what is
  available; and the rest becomes a receivable. So a wallet never goes negative, and usage is always recorded as it was.
- Credits that become free while a receivable is open pay it at once: a wallet that owes has nothing available.
- What is released of an expired grant goes to breakage at once.
- A hold is resolved once: posted, voided or expired. Expiry posts the last reported usage if it has output tokens,
  and nothing otherwise. Usage that is settled after that is posted as far as it is more.
- A refund gives back in the reverse order of what was taken (services/billing/ledger/movements.py).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from services.billing.domain import INT8_MAX, Price, Usage, customer_classes
from services.billing.errors import (
    AmountTooLarge,
    HoldNotExpired,
    HoldNotFound,
    HoldResolved,
    IdempotencyMismatch,
    ModelNotPriced,
    WalletFrozen,
)
from services.billing.ledger import movements
from services.billing.ledger.book import Book, Hold, Journal
from services.billing.ledger.cover import covered
from services.billing.ledger.operations import (
    Charge,
    ExpireGrant,
    ExpireHold,
    ExtendHold,
    Freeze,
    GrantCredits,
    Heartbeat,
    OpenWallet,
    Operation,
    PlaceHold,
    Refund,
    Settle,
    TakeBack,
    Void,
)
from services.billing.ledger.results import Extended, Frozen, Held, HoldExtended, Result, Settled, Voided
from services.billing.ledger.rows import (
    AuditRow,
    HoldExtensionRow,
    HoldRow,
    OpenHoldRow,
    Resolution,
    ResolutionKind,
    Rollup,
    SliceRow,
    TransferCode,
    UsageRow,
)


def decide(journal: Journal, book: Book, operation: Operation) -> Result:
    """Apply one operation to the book. Raises the refusal, with the book as it was."""
    result: Result = _RULES[type(operation)](journal, book, operation)
    return result


def is_late(book: Book, operation: Operation) -> bool:
    """Whether this settles a hold that has expired. Such a settlement is remembered under a key of its own."""
    if not isinstance(operation, Settle):
        return False
    hold = book.holds.get(operation.hold_id)
    return hold is not None and hold.resolution == "expire"


def price_for(journal: Journal, op: PlaceHold) -> Price:
    """The price in force for this customer. Raises ModelNotPriced."""
    for customer_class in customer_classes(op.wallet_id, op.plan):
        price = journal.price(op.model, customer_class)
        if price is not None:
            return price
    raise ModelNotPriced(param="model")


def _place(journal: Journal, book: Book, op: PlaceHold) -> Held:
    if op.hold_id in book.holds or op.hold_id in book.foreign:
        raise IdempotencyMismatch()
    if book.is_frozen:
        raise WalletFrozen()
    now, price = journal.now, price_for(journal, op)
    spendings = book.spendings(op.key_id, op.user_id)
    worst = op.worst_case
    least = worst.with_output(min(1, worst.output_tokens)) if op.clamp else worst
    most, amount = covered(journal, book, price.terms, spendings, worst, least)
    slices = tuple(book.draw(amount, now))
    for part in slices:
        book.reserve(journal, part)
    for spending in spendings:
        spending.held += amount
    row = HoldRow(
        op.hold_id,
        book.wallet_id,
        op.user_id,
        op.key_id,
        op.plan,
        op.model,
        price.id,
        most.input_tokens,
        most.cached_input_tokens,
        most.output_tokens,
        amount,
        op.request_id,
        now,
    )
    hold = Hold(row, price.terms, slices, now + timedelta(milliseconds=op.ttl_ms))
    book.holds[op.hold_id] = hold
    journal.rows.holds.append(row)
    for position, part in enumerate(slices):
        journal.rows.slices.append(SliceRow(op.hold_id, position, part.account_id, part.amount))
    _store_open(journal, hold)
    return Held(op.hold_id, amount, most.output_tokens, price.id, hold.expires_at, book.available(now))


def _extend(journal: Journal, book: Book, op: ExtendHold) -> HoldExtended:
    hold, now = _open_hold(book, op.hold_id), journal.now
    if book.is_frozen:
        raise WalletFrozen()
    before = hold.covered
    if op.output_tokens > before.output_tokens:
        spendings = book.spendings(hold.row.key_id, hold.row.user_id)
        worst, least = before.with_output(op.output_tokens), before.with_output(before.output_tokens + 1)
        most, amount = covered(journal, book, hold.terms, spendings, worst, least, hold)
        slices = tuple(book.draw(amount, now))
        for position, part in enumerate(slices, len(hold.slices)):
            book.reserve(journal, part)
            journal.rows.slices.append(SliceRow(op.hold_id, position, part.account_id, part.amount))
        for spending in spendings:
            spending.held += amount
        hold.slices += slices
        hold.extended_by += amount
        hold.extended_to = most.output_tokens
        journal.rows.extensions.append(
            HoldExtensionRow(op.hold_id, op.number, journal.op_id, most.output_tokens, amount, now)
        )
    return HoldExtended(op.hold_id, hold.amount, hold.covered.output_tokens, book.available(now))


def _beat(journal: Journal, book: Book, op: Heartbeat) -> Extended:
    hold = _open_hold(book, op.hold_id)
    usage = hold.usage.at_least(op.usage)
    hold.terms.cost(usage)  # refused here, so that expiry can always post it
    hold.usage = usage
    hold.expires_at = max(hold.expires_at, journal.now + timedelta(milliseconds=op.ttl_ms))
    _store_open(journal, hold)
    return Extended(hold.expires_at)


def _settle(journal: Journal, book: Book, op: Settle) -> Settled:
    hold = _hold(book, op.hold_id)
    late = hold.resolution == "expire"
    if hold.resolution is not None and not late:
        raise HoldResolved()
    # A heartbeat may have reported a class of tokens that the settlement does not name: usage never shrinks.
    usage = op.usage.at_least(hold.posted if late else hold.usage)
    # More cached input may be cheaper than what the expiry posted: a remainder is never negative.
    cost = max(hold.terms.cost(usage), hold.posted_cost)
    due = cost - hold.posted_cost
    _check_room(book, due)
    settled = _pay(journal, book, hold, due, "late") if late else _resolve(journal, book, hold, "post", due)
    if not late or due > 0 or usage != hold.posted:
        _use(journal, book, hold, int(late), usage, due, op.build, op.finish_reason, op.duration_ms)
    hold.posted, hold.posted_cost = usage, cost
    movements.tidy(journal, book)
    return Settled(cost, settled, book.owed, book.available(journal.now))


def _void(journal: Journal, book: Book, op: Void) -> Voided:
    hold = _open_hold(book, op.hold_id)
    _resolve(journal, book, hold, "void", 0)
    movements.tidy(journal, book)
    return Voided(hold.amount)


def _expire(journal: Journal, book: Book, op: ExpireHold) -> Settled:
    hold = _open_hold(book, op.hold_id)
    if hold.expires_at > journal.now:
        raise HoldNotExpired()
    # Nothing came out: nothing is charged, as for a void.
    used = hold.usage.output_tokens > 0
    cost = hold.terms.cost(hold.usage) if used else 0
    _check_room(book, cost)
    settled = _resolve(journal, book, hold, "expire", cost, effective_at=hold.expires_at)
    if used:
        age_ms = max(0, int((journal.now - hold.row.created_at).total_seconds() * 1000))
        _use(journal, book, hold, 0, hold.usage, cost, "", "expired", age_ms)
        hold.posted, hold.posted_cost = hold.usage, cost
    movements.tidy(journal, book)
    return Settled(cost, settled, book.owed, book.available(journal.now))


def _freeze(journal: Journal, book: Book, op: Freeze) -> Frozen:
    book.is_frozen = op.frozen
    journal.books[book.wallet_id] = book
    journal.rows.audit.append(
        AuditRow(book.wallet_id, journal.op_id, op.kind, None, op.frozen, op.reason, op.actor, journal.now)
    )
    return Frozen(op.frozen)


def _nothing(journal: Journal, book: Book, op: OpenWallet) -> None:
    return None


def _store_open(journal: Journal, hold: Hold) -> None:
    usage, row = hold.usage, hold.row
    journal.rows.opened[row.id] = OpenHoldRow(
        row.id, row.wallet_id, hold.expires_at, usage.input_tokens, usage.cached_input_tokens, usage.output_tokens
    )


def _resolve(
    journal: Journal,
    book: Book,
    hold: Hold,
    kind: ResolutionKind,
    cost: int,
    *,
    effective_at: datetime | None = None,
) -> int:
    """End an open hold: release it, pay `cost`. The amount that credits paid."""
    row = hold.row
    for part in hold.slices:
        book.release(journal, part)
    for spending in book.spendings(row.key_id, row.user_id):
        spending.held -= hold.amount
    settled = _pay(journal, book, hold, cost, "usage", slices=hold.slices, effective_at=effective_at)
    hold.resolution = kind
    book.resolved.append(row.id)
    journal.rows.opened.pop(row.id, None)
    journal.rows.closed.append(row.id)
    journal.rows.resolutions.append(Resolution(row.id, journal.op_id, kind, settled))
    return settled


def _pay(
    journal: Journal,
    book: Book,
    hold: Hold,
    cost: int,
    code: TransferCode,
    *,
    slices: tuple[Any, ...] = (),
    effective_at: datetime | None = None,
) -> int:
    """Take `cost`: from what the hold had reserved, from what is available, and the rest as owed."""
    draws: dict[UUID, int] = {}
    rest, hold_id = cost, hold.row.id
    for part in slices:
        taken = min(part.amount, rest)
        draws[part.account_id] = draws.get(part.account_id, 0) + taken
        rest -= taken
    if rest > 0:
        for grant in book.drawable(journal.now):
            taken = draws.get(grant.account.id, 0)
            more = min(grant.account.free - taken, rest)
            if more > 0:
                draws[grant.account.id] = taken + more
                rest -= more
    revenue = book.accounts["revenue"]
    for account_id, amount in draws.items():
        if amount > 0:
            account = book.grants[account_id].account
            book.post(journal, account, revenue, amount, code, hold_id=hold_id, effective_at=effective_at)
    if rest > 0:
        owed = book.accounts["receivable"]
        book.post(journal, owed, revenue, rest, "receivable", hold_id=hold_id, effective_at=effective_at)
    return cost - rest


def _use(
    journal: Journal,
    book: Book,
    hold: Hold,
    part: int,
    usage: Usage,
    cost: int,
    build: str,
    finish_reason: str,
    duration_ms: int,
) -> None:
    """Record usage beyond what was posted before, in its row, in the day's sums and in the budgets' counters."""
    row, (plain, cached, output) = hold.row, usage.minus(hold.posted)
    who = (row.wallet_id, row.user_id, row.key_id)
    journal.rows.usages.append(
        UsageRow(
            row.id,
            part,
            journal.op_id,
            *who,
            row.model,
            build,
            row.price_id,
            plain,
            cached,
            output,
            cost,
            finish_reason,
            duration_ms,
            row.request_id,
        )
    )
    sums = journal.rows.rollups.setdefault(
        Rollup(row.wallet_id, journal.today, row.model, row.key_id, row.user_id), [0, 0, 0, 0, 0]
    )
    for index, more in enumerate((1 - part, plain, cached, output, cost)):
        sums[index] += more
    for spending in book.spendings(row.key_id, row.user_id):
        spending.add(cost, journal.today)


def _check_room(book: Book, cost: int) -> None:
    """Raise AmountTooLarge before anything is changed; what a wallet has was granted, so only its debt can overflow."""
    if book.accounts["revenue"].credits_posted > INT8_MAX - cost:
        raise AmountTooLarge()


def _hold(book: Book, hold_id: UUID) -> Hold:
    hold = book.holds.get(hold_id)
    if hold is None:
        raise HoldNotFound()
    return hold


def _open_hold(book: Book, hold_id: UUID) -> Hold:
    hold = _hold(book, hold_id)
    if hold.resolution is not None:
        raise HoldResolved()
    return hold


_RULES: dict[type[Operation], Any] = {
    PlaceHold: _place,
    Settle: _settle,
    Heartbeat: _beat,
    ExtendHold: _extend,
    Void: _void,
    ExpireHold: _expire,
    GrantCredits: movements.grant,
    Charge: movements.charge,
    Refund: movements.refund,
    TakeBack: movements.take_back,
    Freeze: _freeze,
    ExpireGrant: movements.expire_grant,
    OpenWallet: _nothing,
}
