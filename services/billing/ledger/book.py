"""A wallet's books in memory: what the kernel decides on.

A `Book` is loaded once and changed by operations in order; a `Journal` collects what a batch of them comes to. Each
wallet has accounts of its own (docs/decisions/0010): one per grant, limited to what was put into it, and four
of the system:

    funding     where grants come from          revenue     what usage came to
    receivable  usage beyond the wallet's credits, owed     breakage    what expired

One transfer is one debit and one credit of the same amount, so that an imbalance cannot be written. Nothing here does
I/O or looks at a clock; ids of rows come from who makes the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Literal, NamedTuple
from uuid import UUID

from services.billing.domain import INT8_MAX, Price, PriceTerms, Usage
from services.billing.errors import AmountTooLarge
from services.billing.ledger.rows import (
    AccountRow,
    Counters,
    GrantRow,
    HoldRow,
    Rows,
    Transfer,
    TransferCode,
    WalletRow,
)
from services.billing.ledger.spending import Spending, Subject

AccountKind = Literal["grant", "funding", "revenue", "receivable", "breakage"]
SystemKind = Literal["funding", "revenue", "receivable", "breakage"]
SYSTEM_KINDS: tuple[SystemKind, ...] = ("funding", "revenue", "receivable", "breakage")
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Account:
    """Counters only grow, but for what is pending. A limited account never debits more than it was credited."""

    id: UUID
    kind: AccountKind
    debits_posted: int = 0
    credits_posted: int = 0
    debits_pending: int = 0
    credits_pending: int = 0

    @property
    def limited(self) -> bool:
        return self.kind == "grant"

    @property
    def left(self) -> int:
        """Of a grant: credits not spent, held ones included."""
        return self.credits_posted - self.debits_posted

    @property
    def free(self) -> int:
        """Of a grant: credits neither spent nor held."""
        return self.credits_posted - self.debits_posted - self.debits_pending

    def counters(self) -> Counters:
        return Counters(self.id, self.debits_posted, self.credits_posted, self.debits_pending, self.credits_pending)


@dataclass(slots=True)
class Grant:
    """Credits put into a wallet; drawn by priority (smaller first), then expiry (soonest first), then id."""

    account: Account
    priority: int
    expires_at: datetime | None

    def order(self) -> tuple[int, bool, float, UUID]:
        expires = self.expires_at
        return self.priority, expires is None, expires.timestamp() if expires else 0.0, self.account.id

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now


class Slice(NamedTuple):
    """The part of a hold that one grant covers."""

    account_id: UUID
    amount: int


@dataclass(slots=True)
class Hold:
    """A hold with its present state: open until `resolution` says how it ended.

    `usage` is the last that a heartbeat reported; `posted` and `posted_cost` are its part 0 of usage. `slices` are in
    the order in which they were reserved; an extension may have reserved more of a grant that has one. `extended_by` is
    what extensions added to the amount, `extended_to` the output tokens that it covers since.
    """

    row: HoldRow
    terms: PriceTerms
    slices: tuple[Slice, ...]
    expires_at: datetime
    usage: Usage = field(default_factory=Usage)
    resolution: str | None = None
    posted: Usage = field(default_factory=Usage)
    posted_cost: int = 0
    extended_by: int = 0
    extended_to: int = 0

    @property
    def amount(self) -> int:
        """What it reserves now."""
        return self.row.amount + self.extended_by

    @property
    def covered(self) -> Usage:
        """What it covers now."""
        row = self.row
        return Usage(row.input_tokens, row.cached_input_tokens, max(row.output_tokens, self.extended_to))


class Draw(NamedTuple):
    """A transfer that took something for a hold or a charge, or gave it back (`refund`)."""

    account_id: UUID
    amount: int
    code: TransferCode


class Ending(NamedTuple):
    """How a batch leaves a book: where it is once that is committed, and which holds and grants are done for then."""

    seq: int
    is_frozen: bool
    resolved: list[UUID]
    spent: set[UUID]


@dataclass(slots=True)
class Journal:
    """One batch: its time, where ids come from, the prices in force, and the rows of what was decided so far.

    `now` decides what is expired; `op_id` is the operation being applied.
    """

    now: datetime
    next_id: Callable[[], UUID]
    prices: dict[tuple[str, str], list[Price]]
    op_id: UUID
    rows: Rows = field(default_factory=Rows)
    touched: dict[UUID, Account] = field(default_factory=dict)
    books: dict[UUID, Book] = field(default_factory=dict)

    @property
    def today(self) -> date:
        return self.now.astimezone(UTC).date()

    def price(self, model: str, customer_class: str) -> Price | None:
        for price in self.prices.get((model, customer_class), ()):
            if price.valid_from <= self.now and (price.valid_until is None or self.now < price.valid_until):
                return price
        return None

    def wallets(self, *, new: bool) -> list[WalletRow]:
        """Of the wallets that were changed: the new ones, or the others."""
        return [
            WalletRow(book.wallet_id, book.seq_written, book.seq, book.booked_at, book.frozen_change)
            for book in self.books.values()
            if book.is_new == new
        ]

    def counters(self) -> list[Counters]:
        """Of every account that was touched, but for those that are new: their rows have them."""
        new = {row.id for row in self.rows.accounts}
        return [account.counters() for account in self.touched.values() if account.id not in new]

    def new_accounts(self) -> list[AccountRow]:
        """The rows of new accounts, with the counters that they have at the end of the batch."""
        return [row._replace(**self.touched[row.id].counters()._asdict()) for row in self.rows.accounts]


@dataclass(slots=True)
class Book:
    """One wallet. `booked_at` never goes back within it, even where the clock was set back."""

    wallet_id: UUID
    seq: int = 0
    version: int = 0
    is_frozen: bool = False
    booked_at: datetime = LONG_AGO
    has_signup: bool = False
    accounts: dict[SystemKind, Account] = field(default_factory=dict)
    grants: dict[UUID, Grant] = field(default_factory=dict)
    order: list[Grant] = field(default_factory=list)
    holds: dict[UUID, Hold] = field(default_factory=dict)
    foreign: set[UUID] = field(default_factory=set)
    spending: dict[tuple[Subject, UUID], Spending] = field(default_factory=dict)
    draws: dict[UUID, list[Draw]] = field(default_factory=dict)
    resolved: list[UUID] = field(default_factory=list)
    balance: int = 0
    seq_written: int = 0
    frozen_written: bool = False
    is_new: bool = False
    is_spoilt: bool = False  # holds what was decided and never written

    def available(self, now: datetime) -> int:
        """What a hold may take now."""
        return sum(grant.account.free for grant in self.drawable(now))

    def reachable(self, now: datetime) -> int:
        """What a hold could take if nothing else were in flight."""
        return sum(grant.account.left for grant in self.drawable(now))

    @property
    def frozen_change(self) -> bool | None:
        """What this batch has made of it; None when it left it alone."""
        return self.is_frozen if self.is_frozen != self.frozen_written else None

    @property
    def owed(self) -> int:
        account = self.accounts["receivable"]
        return account.debits_posted - account.credits_posted

    def drawable(self, now: datetime) -> Iterator[Grant]:
        """Grants that are not expired, in the order in which they are drawn."""
        for grant in self.order:
            if grant.expires_at is None or grant.expires_at > now:
                yield grant

    def spendings(self, key_id: UUID | None, user_id: UUID | None) -> list[Spending]:
        """The counters of the budgets that this key and this member have; mostly none."""
        if not self.spending:
            return []
        found = (
            self.spending.get(("key", key_id)) if key_id is not None else None,
            self.spending.get(("member", user_id)) if user_id is not None else None,
        )
        return [spending for spending in found if spending is not None]

    def draw(self, amount: int, now: datetime) -> list[Slice]:
        """Up to `amount` from what is available, in order; less when there is less. Changes nothing."""
        slices = []
        for grant in self.drawable(now):
            if amount <= 0:
                break
            part = min(grant.account.free, amount)
            if part > 0:
                slices.append(Slice(grant.account.id, part))
                amount -= part
        return slices

    def post(
        self,
        journal: Journal,
        debit: Account,
        credit: Account,
        amount: int,
        code: TransferCode,
        *,
        hold_id: UUID | None = None,
        effective_at: datetime | None = None,
    ) -> None:
        """One transfer. Raises AmountTooLarge, and changes nothing, when a counter would pass an int8."""
        assert amount > 0, "a transfer has an amount"
        assert debit is not credit, "a transfer has two accounts"
        if debit.debits_posted > INT8_MAX - amount or credit.credits_posted > INT8_MAX - amount:
            raise AmountTooLarge()
        debit.debits_posted += amount
        credit.credits_posted += amount
        if debit.kind == "grant":
            assert debit.free >= 0, "a limited account debits no more than it was credited"
            self.balance -= amount
        if credit.kind == "grant":
            self.balance += amount
        journal.touched[debit.id] = debit
        journal.touched[credit.id] = credit
        journal.books[self.wallet_id] = self
        if journal.now > self.booked_at:
            self.booked_at = journal.now
        self.seq += 1
        journal.rows.transfers.append(
            Transfer(
                journal.next_id(),
                journal.op_id,
                self.wallet_id,
                self.seq,
                debit.id,
                credit.id,
                amount,
                code,
                hold_id,
                self.balance,
                effective_at or journal.now,
                self.booked_at,
            )
        )
        if hold_id in self.draws:
            self.draws[hold_id].append(Draw(credit.id if code == "refund" else debit.id, amount, code))

    def reserve(self, journal: Journal, part: Slice) -> None:
        """Make a slice pending."""
        account, revenue = self.grants[part.account_id].account, self.accounts["revenue"]
        account.debits_pending += part.amount
        revenue.credits_pending += part.amount
        assert account.free >= 0, "a hold takes only what is free"
        journal.touched[account.id] = account
        journal.touched[revenue.id] = revenue

    def release(self, journal: Journal, part: Slice) -> None:
        """Undo `reserve`."""
        account, revenue = self.grants[part.account_id].account, self.accounts["revenue"]
        account.debits_pending -= part.amount
        revenue.credits_pending -= part.amount
        assert account.debits_pending >= 0, "only what is pending is released"
        assert revenue.credits_pending >= 0, "only what is pending is released"
        journal.touched[account.id] = account
        journal.touched[revenue.id] = revenue

    def open(self, journal: Journal) -> None:
        """Make the system's accounts of a wallet that is not in the database yet."""
        for kind in SYSTEM_KINDS:
            self.accounts[kind] = self._new_account(journal, journal.next_id(), kind)
        self.is_new, self.booked_at = True, journal.now
        journal.books[self.wallet_id] = self

    def add_grant(
        self,
        journal: Journal,
        account_id: UUID,
        *,
        priority: int,
        expires_at: datetime | None,
        source: str,
        reason: str,
    ) -> Grant:
        """A new grant, without its credits: post them."""
        grant = Grant(self._new_account(journal, account_id, "grant"), priority, expires_at)
        self.know(grant)
        self.has_signup = self.has_signup or source == "signup"
        journal.rows.grants.append(
            GrantRow(account_id, self.wallet_id, priority, journal.now, expires_at, source, reason)
        )
        return grant

    def know(self, grant: Grant) -> None:
        """A grant that was loaded, or has just been made."""
        self.grants[grant.account.id] = grant
        self.order.append(grant)
        self.order.sort(key=Grant.order)
        self.balance += grant.account.left

    def ending(self) -> Ending:
        """The end of a batch's decisions. What is decided from here on belongs to the next one."""
        resolved, self.resolved = self.resolved, []
        spent = {grant.account.id for grant in self.order if grant.account.left == 0}
        return Ending(self.seq, self.is_frozen, resolved, spent)

    def written(self, ending: Ending) -> None:
        """The batch that ended so is committed: what is done for is only in the database now."""
        self.is_new, self.seq_written, self.frozen_written = False, ending.seq, ending.is_frozen
        if ending.spent:
            self.order = [grant for grant in self.order if grant.account.id not in ending.spent]
            self.grants = {grant.account.id: grant for grant in self.order}
        for hold_id in ending.resolved:
            self.holds.pop(hold_id, None)
        self.draws.clear()
        self.foreign.clear()

    def _new_account(self, journal: Journal, account_id: UUID, kind: AccountKind) -> Account:
        account = Account(account_id, kind)
        journal.rows.accounts.append(AccountRow(account_id, self.wallet_id, kind, kind == "grant", 0, 0, 0, 0))
        journal.touched[account_id] = account
        return account
