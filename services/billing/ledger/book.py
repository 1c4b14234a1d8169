"""A wallet's books in memory: what the kernel decides on, and the rows that its decisions come to.

A `Book` is loaded under the wallet's lock, changed by any number of operations in order, and written back whole. Each
wallet has accounts of its own (docs/decisions/0010): one per grant, limited to what was put into it, and four
of the system:

    funding     where grants come from          revenue     what usage came to
    receivable  usage beyond the wallet's credits, owed     breakage    what expired

One transfer is one debit and one credit of the same amount, so that an imbalance cannot be written. Nothing here does
I/O or looks at a clock; ids of rows are given by who writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from uuid import UUID

from services.billing.domain import INT8_MAX, Price, Usage
from services.billing.errors import AmountTooLarge

AccountKind = Literal["grant", "funding", "revenue", "receivable", "breakage"]
SYSTEM_KINDS: tuple[AccountKind, ...] = ("funding", "revenue", "receivable", "breakage")
TransferCode = Literal["grant", "usage", "late", "receivable", "repayment", "expiry"]
ResolutionKind = Literal["post", "void", "expire"]


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
        return self.left - self.debits_pending


@dataclass(slots=True)
class Grant:
    """Credits put into a wallet; drawn by priority (smaller first), then expiry (soonest first), then id."""

    account: Account
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    source: str
    reason: str = ""

    def order(self) -> tuple[int, bool, float, UUID]:
        expires = self.expires_at
        return self.priority, expires is None, expires.timestamp() if expires else 0.0, self.account.id

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a hold that one grant covers."""

    account_id: UUID
    amount: int


@dataclass(frozen=True, slots=True)
class HoldRow:
    """A hold as it was placed; never changes."""

    id: UUID
    wallet_id: UUID
    user_id: UUID | None
    key_id: UUID | None
    plan: str
    model: str
    price: Price
    covered: Usage
    amount: int
    request_id: str
    created_at: datetime
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class OpenHold:
    """What changes of a hold while it is open."""

    expires_at: datetime
    usage: Usage


@dataclass(frozen=True, slots=True)
class Resolution:
    """How a hold ended; `amount` is what its credits paid."""

    hold_id: UUID
    op_id: UUID
    kind: ResolutionKind
    amount: int
    at: datetime


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used: part 0 when the hold was resolved, part 1 what a settlement after its expiry added."""

    hold: HoldRow
    part: int
    op_id: UUID
    build: str
    tokens: tuple[int, int, int]
    cost: int
    finish_reason: str
    duration_ms: int
    at: datetime


@dataclass(slots=True)
class HoldState:
    """A hold with its present state. `posted` and `posted_cost` are its part 0 of usage."""

    row: HoldRow
    open: OpenHold | None = None
    resolution: Resolution | None = None
    posted: Usage = field(default_factory=Usage)
    posted_cost: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """One debit and one credit. `balance_after` is the sum of what is left of the wallet's grants."""

    op_id: UUID
    seq: int
    debit_account: UUID
    credit_account: UUID
    amount: int
    code: TransferCode
    hold_id: UUID | None
    balance_after: int
    effective_at: datetime
    booked_at: datetime


@dataclass(slots=True)
class Rows:
    """What has to be written, besides the counters of touched accounts."""

    accounts: list[Account] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    holds: list[HoldRow] = field(default_factory=list)
    opened: dict[UUID, OpenHold] = field(default_factory=dict)
    closed: list[UUID] = field(default_factory=list)
    resolutions: list[Resolution] = field(default_factory=list)
    usages: list[UsageRow] = field(default_factory=list)
    expired_grants: list[UUID] = field(default_factory=list)


@dataclass(slots=True)
class Book:
    """One wallet. `op_id`, `now` and `booked_at` are those of the operation being applied.

    `now` decides what is expired; `booked_at` never goes back within a wallet, even where the clock was set back.
    """

    wallet_id: UUID
    seq: int
    is_frozen: bool
    now: datetime
    booked_at: datetime
    op_id: UUID
    accounts: dict[AccountKind, Account]
    grants: dict[UUID, Grant] = field(default_factory=dict)
    holds: dict[UUID, HoldState] = field(default_factory=dict)
    prices: dict[tuple[str, str], Price] = field(default_factory=dict)
    foreign_holds: set[UUID] = field(default_factory=set)
    touched: dict[UUID, Account] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)

    @property
    def balance(self) -> int:
        """Credits not spent, held ones included."""
        return sum(grant.account.left for grant in self.grants.values())

    @property
    def available(self) -> int:
        """What a hold may take now."""
        return sum(grant.account.free for grant in self.drawable())

    @property
    def reachable(self) -> int:
        """What a hold could take if nothing else were in flight."""
        return sum(grant.account.left for grant in self.drawable())

    @property
    def owed(self) -> int:
        account = self.accounts["receivable"]
        return account.debits_posted - account.credits_posted

    def drawable(self) -> Iterator[Grant]:
        """Grants that are not expired, in the order in which they are drawn."""
        live = (g for g in self.grants.values() if not g.is_expired(self.now))
        yield from sorted(live, key=Grant.order)

    def draw(self, amount: int) -> list[Slice]:
        """Up to `amount` from what is available, in order; less when there is less. Changes nothing."""
        slices = []
        for grant in self.drawable():
            if amount <= 0:
                break
            part = min(grant.account.free, amount)
            if part > 0:
                slices.append(Slice(grant.account.id, part))
                amount -= part
        return slices

    def post(
        self,
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
        if max(debit.debits_posted, credit.credits_posted) > INT8_MAX - amount:
            raise AmountTooLarge()
        debit.debits_posted += amount
        credit.credits_posted += amount
        assert not debit.limited or debit.free >= 0, "a limited account debits no more than it was credited"
        self._touch(debit, credit)
        self.seq += 1
        transfer = Transfer(
            op_id=self.op_id,
            seq=self.seq,
            debit_account=debit.id,
            credit_account=credit.id,
            amount=amount,
            code=code,
            hold_id=hold_id,
            balance_after=self.balance,
            effective_at=effective_at or self.now,
            booked_at=self.booked_at,
        )
        self.rows.transfers.append(transfer)

    def reserve(self, part: Slice) -> None:
        """Make a slice pending."""
        account, revenue = self.grants[part.account_id].account, self.accounts["revenue"]
        account.debits_pending += part.amount
        revenue.credits_pending += part.amount
        assert account.free >= 0, "a hold takes only what is free"
        self._touch(account, revenue)

    def release(self, part: Slice) -> None:
        """Undo `reserve`."""
        account, revenue = self.grants[part.account_id].account, self.accounts["revenue"]
        account.debits_pending -= part.amount
        revenue.credits_pending -= part.amount
        assert account.debits_pending >= 0, "only what is pending is released"
        assert revenue.credits_pending >= 0, "only what is pending is released"
        self._touch(account, revenue)

    def add_account(self, account: Account) -> None:
        """An account that is not in the database yet."""
        self.rows.accounts.append(account)
        if account.kind != "grant":
            self.accounts[account.kind] = account

    def add_grant(self, grant: Grant) -> None:
        self.add_account(grant.account)
        self.grants[grant.account.id] = grant
        self.rows.grants.append(grant)

    def _touch(self, *accounts: Account) -> None:
        for account in accounts:
            self.touched[account.id] = account
