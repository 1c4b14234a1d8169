"""The ledger's decisions, pure: a book and an operation in; the result out, and the rows to write in the book.

A refusal is raised before anything is changed. The rules:
- A hold reserves the worst case, from grants that are not expired, by priority, expiry, id.
- A settlement takes the hold first, in the same order; what was used beyond it from what is available; and the rest
  becomes a receivable. So a wallet never goes negative, and usage is always recorded as it was.
- Credits that become free while a receivable is open pay it at once: a wallet that owes has nothing available.
- What is released of an expired grant goes to breakage at once.
- A hold is resolved once: posted, voided or expired. Expiry posts the last reported usage if it has output tokens,
  and nothing otherwise. Usage that is settled after that is posted as far as it is more.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from services.billing.domain import INT8_MAX, Price, PriceTerms, Usage, customer_classes
from services.billing.errors import (
    AmountTooLarge,
    CreditsReserved,
    ExpiryInPast,
    HoldNotExpired,
    HoldNotFound,
    HoldResolved,
    IdempotencyMismatch,
    InsufficientCredits,
    ModelNotPriced,
    WalletFrozen,
)
from services.billing.ledger.book import (
    Account,
    Book,
    Grant,
    HoldRow,
    HoldState,
    OpenHold,
    Resolution,
    ResolutionKind,
    TransferCode,
    UsageRow,
)
from services.billing.ledger.operations import (
    ExpireGrant,
    ExpireHold,
    GrantCredits,
    Heartbeat,
    OpenWallet,
    Operation,
    PlaceHold,
    Settle,
    Void,
)
from services.billing.ledger.results import Extended, Granted, GrantExpired, Held, Result, Settled, Voided

CREDITS_RESERVED_RETRY_S = 2


def decide(book: Book, operation: Operation) -> Result:
    """Apply one operation to the book. Raises the refusal, with the book as it was."""
    match operation:
        case PlaceHold():
            return _place(book, operation)
        case Heartbeat():
            return _extend(book, operation)
        case Settle():
            return _settle(book, operation)
        case Void():
            return _void(book, operation)
        case ExpireHold():
            return _expire(book, operation)
        case GrantCredits():
            return _grant(book, operation)
        case ExpireGrant():
            return _expire_grant(book, operation)
        case OpenWallet():
            return None
        case _:
            raise AssertionError(f"no rule for {operation.kind}")


def memory_key(book: Book, operation: Operation) -> str:
    """The key to remember an operation under, decided before it is applied."""
    if isinstance(operation, Settle) and _is_late(book, operation):
        return operation.late_key
    return operation.key


def _grant(book: Book, op: GrantCredits) -> Granted:
    funding = book.accounts["funding"]
    if not 0 < op.amount <= INT8_MAX - funding.debits_posted:
        raise AmountTooLarge()
    if op.expires_at is not None and op.expires_at <= book.now:
        raise ExpiryInPast(param="expires_at")
    grant = Grant(
        account=Account(op.account_id, "grant"),
        priority=op.priority,
        effective_at=book.now,
        expires_at=op.expires_at,
        source=op.source,
        reason=op.reason,
    )
    book.add_grant(grant)
    book.post(funding, grant.account, op.amount, "grant")
    _tidy(book)
    return Granted(op.account_id, op.amount, book.available, book.owed)


def _place(book: Book, op: PlaceHold) -> Held:
    if op.hold_id in book.foreign_holds or op.hold_id in book.holds:
        raise IdempotencyMismatch()
    if book.is_frozen:
        raise WalletFrozen()
    price = price_for(book, op)
    covered = _affordable(book, op, price.terms)
    amount = price.terms.cost(covered)
    slices = tuple(book.draw(amount))
    assert sum(s.amount for s in slices) == amount, "what is affordable can be drawn"
    for part in slices:
        book.reserve(part)
    row = HoldRow(
        id=op.hold_id,
        wallet_id=book.wallet_id,
        user_id=op.user_id,
        key_id=op.key_id,
        plan=op.plan,
        model=op.model,
        price=price,
        covered=covered,
        amount=amount,
        request_id=op.request_id,
        created_at=book.now,
        slices=slices,
    )
    opened = OpenHold(_after(book.now, op.ttl_ms), Usage())
    book.holds[row.id] = HoldState(row, opened)
    book.rows.holds.append(row)
    book.rows.opened[row.id] = opened
    return Held(row.id, amount, covered.output_tokens, price.id, opened.expires_at, book.available)


def price_for(book: Book, op: PlaceHold) -> Price:
    """The price in force for this customer. Raises ModelNotPriced."""
    for customer_class in customer_classes(op.wallet_id, op.plan):
        price = book.prices.get((op.model, customer_class))
        if price is not None:
            return price
    raise ModelNotPriced(param="model")


def _affordable(book: Book, op: PlaceHold, terms: PriceTerms) -> Usage:
    """The usage that the hold will cover. Raises one of the two refusals when there is none."""
    worst = op.worst_case
    if book.owed == 0:
        if terms.cost(worst) <= book.available:
            return worst
        covered = terms.output_tokens_within(worst, book.available) if op.clamp else -1
        if covered >= 1:
            return Usage(worst.input_tokens, worst.cached_input_tokens, covered)
        least = Usage(worst.input_tokens, worst.cached_input_tokens, min(1, worst.output_tokens))
        if terms.cost(least if op.clamp else worst) <= book.reachable:
            raise CreditsReserved(retry_after_s=CREDITS_RESERVED_RETRY_S)
    raise InsufficientCredits()


def _extend(book: Book, op: Heartbeat) -> Extended:
    hold = _hold(book, op.hold_id)
    if hold.open is None:
        raise HoldResolved()
    usage = hold.open.usage.at_least(op.usage)
    hold.row.price.terms.cost(usage)  # refused here, so that expiry can always post it
    expires_at = max(hold.open.expires_at, _after(book.now, op.ttl_ms))
    hold.open = OpenHold(expires_at, usage)
    book.rows.opened[op.hold_id] = hold.open
    return Extended(expires_at)


def _settle(book: Book, op: Settle) -> Settled:
    hold = _hold(book, op.hold_id)
    late = _is_late(book, op)
    if hold.open is None and not late:
        raise HoldResolved()
    # A heartbeat may have reported a class of tokens that the settlement does not name: usage never shrinks.
    usage = op.usage.at_least(hold.open.usage if hold.open else hold.posted)
    # More cached input may be cheaper than what the expiry posted: a remainder is never negative.
    cost = max(hold.row.price.terms.cost(usage), hold.posted_cost)
    due = cost - hold.posted_cost
    _check_room(book, due)
    settled = _pay(book, hold.row, due, "late") if late else _resolve(book, hold, "post", due)
    if not late or due > 0 or usage != hold.posted:
        part = UsageRow(
            hold=hold.row,
            part=int(late),
            op_id=book.op_id,
            build=op.build,
            tokens=usage.minus(hold.posted),
            cost=due,
            finish_reason=op.finish_reason,
            duration_ms=op.duration_ms,
            at=book.now,
        )
        book.rows.usages.append(part)
    hold.posted, hold.posted_cost = usage, cost
    _tidy(book)
    return Settled(cost, settled, book.owed, book.available)


def _void(book: Book, op: Void) -> Voided:
    hold = _hold(book, op.hold_id)
    if hold.open is None:
        raise HoldResolved()
    _resolve(book, hold, "void", 0)
    _tidy(book)
    return Voided(hold.row.amount)


def _expire(book: Book, op: ExpireHold) -> Settled:
    hold = _hold(book, op.hold_id)
    if hold.open is None:
        raise HoldResolved()
    if hold.open.expires_at > book.now:
        raise HoldNotExpired()
    opened = hold.open
    # Nothing came out: nothing is charged, as for a void.
    cost = hold.row.price.terms.cost(opened.usage) if opened.usage.output_tokens > 0 else 0
    _check_room(book, cost)
    settled = _resolve(book, hold, "expire", cost, effective_at=opened.expires_at)
    if opened.usage.output_tokens > 0:
        age_ms = int((book.now - hold.row.created_at).total_seconds() * 1000)
        part = UsageRow(
            hold=hold.row,
            part=0,
            op_id=book.op_id,
            build="",
            tokens=opened.usage.minus(Usage()),
            cost=cost,
            finish_reason="expired",
            duration_ms=age_ms,
            at=book.now,
        )
        book.rows.usages.append(part)
        hold.posted, hold.posted_cost = opened.usage, cost
    _tidy(book)
    return Settled(cost, settled, book.owed, book.available)


def _expire_grant(book: Book, op: ExpireGrant) -> GrantExpired:
    grant = book.grants.get(op.account_id)
    amount = grant.account.free if grant is not None and grant.is_expired(book.now) else 0
    book.rows.expired_grants.append(op.account_id)
    _tidy(book)
    return GrantExpired(amount)


def _resolve(
    book: Book, hold: HoldState, kind: ResolutionKind, cost: int, *, effective_at: datetime | None = None
) -> int:
    """End an open hold: release it, pay `cost`. The amount that credits paid."""
    for part in hold.row.slices:
        book.release(part)
    settled = _pay(book, hold.row, cost, "usage", from_hold=True, effective_at=effective_at)
    hold.resolution = Resolution(hold.row.id, book.op_id, kind, settled, book.now)
    hold.open = None
    book.rows.opened.pop(hold.row.id, None)
    book.rows.closed.append(hold.row.id)
    book.rows.resolutions.append(hold.resolution)
    return settled


def _pay(
    book: Book,
    row: HoldRow,
    cost: int,
    code: TransferCode,
    *,
    from_hold: bool = False,
    effective_at: datetime | None = None,
) -> int:
    """Take `cost`: from what the hold had reserved, from what is available, and the rest as owed."""
    draws: dict[UUID, int] = {}
    rest = cost
    for part in row.slices if from_hold else ():
        draws[part.account_id] = min(part.amount, rest)
        rest -= draws[part.account_id]
    for grant in book.drawable():
        taken = draws.get(grant.account.id, 0)
        more = min(grant.account.free - taken, rest)
        if more > 0:
            draws[grant.account.id] = taken + more
            rest -= more
    revenue = book.accounts["revenue"]
    for account_id, amount in draws.items():
        if amount > 0:
            account = book.grants[account_id].account
            book.post(account, revenue, amount, code, hold_id=row.id, effective_at=effective_at)
    if rest > 0:
        owed = book.accounts["receivable"]
        book.post(owed, revenue, rest, "receivable", hold_id=row.id, effective_at=effective_at)
    return cost - rest


def _tidy(book: Book) -> None:
    """Free credits of expired grants go to breakage; other free credits pay what is owed."""
    breakage, receivable = book.accounts["breakage"], book.accounts["receivable"]
    for grant in book.grants.values():
        if grant.is_expired(book.now) and grant.account.free > 0:
            book.post(grant.account, breakage, grant.account.free, "expiry", effective_at=grant.expires_at)
    if book.owed > 0:
        for part in book.draw(book.owed):
            book.post(book.grants[part.account_id].account, receivable, part.amount, "repayment")


def _check_room(book: Book, cost: int) -> None:
    """Raise AmountTooLarge before anything is changed; what a wallet has was granted, so only its debt can overflow."""
    if book.accounts["revenue"].credits_posted > INT8_MAX - cost:
        raise AmountTooLarge()


def _hold(book: Book, hold_id: UUID) -> HoldState:
    hold = book.holds.get(hold_id)
    if hold is None:
        raise HoldNotFound()
    return hold


def _is_late(book: Book, op: Settle) -> bool:
    hold = book.holds.get(op.hold_id)
    return hold is not None and hold.resolution is not None and hold.resolution.kind == "expire"


def _after(now: datetime, ttl_ms: int) -> datetime:
    return now + timedelta(milliseconds=ttl_ms)
