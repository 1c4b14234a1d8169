"""The rows that a batch comes to, column by column as they are written: repository/ledger.py names the same columns.

They are tuples, and not objects, because a batch has thousands of them and each is made once and read once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Literal, NamedTuple
from uuid import UUID

TransferCode = Literal["grant", "usage", "late", "receivable", "repayment", "expiry", "charge", "refund", "reversal"]
ResolutionKind = Literal["post", "void", "expire"]


class WalletRow(NamedTuple):
    """Of a wallet that is there, `seq_before` must be what the database has: nothing unseen is overwritten.

    `frozen` is None where the batch has not changed it: somebody else may have meanwhile.
    """

    id: UUID
    seq_before: int
    seq: int
    updated_at: datetime
    frozen: bool | None


class AccountRow(NamedTuple):
    id: UUID
    wallet_id: UUID
    kind: str
    limited: bool
    debits_posted: int
    credits_posted: int
    debits_pending: int
    credits_pending: int


class Counters(NamedTuple):
    id: UUID
    debits_posted: int
    credits_posted: int
    debits_pending: int
    credits_pending: int


class GrantRow(NamedTuple):
    account_id: UUID
    wallet_id: UUID
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    source: str
    reason: str


class Transfer(NamedTuple):
    """One debit and one credit. `balance_after` is the sum of what is left of the wallet's grants."""

    id: UUID
    op_id: UUID
    wallet_id: UUID
    wallet_seq: int
    debit_account: UUID
    credit_account: UUID
    amount: int
    code: TransferCode
    hold_id: UUID | None
    balance_after: int
    effective_at: datetime
    booked_at: datetime


class HoldRow(NamedTuple):
    """A hold as it was placed; never changes. Tokens are those that it covers."""

    id: UUID
    wallet_id: UUID
    user_id: UUID | None
    key_id: UUID | None
    plan: str
    model: str
    price_id: UUID
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    amount: int
    request_id: str
    created_at: datetime


class SliceRow(NamedTuple):
    """The part of a hold that one grant covers."""

    hold_id: UUID
    position: int
    account_id: UUID
    amount: int


class HoldExtensionRow(NamedTuple):
    """What a hold covers since then: `output_tokens` in all, for which `amount` more is held."""

    hold_id: UUID
    number: int
    op_id: UUID
    output_tokens: int
    amount: int
    created_at: datetime


class OpenHoldRow(NamedTuple):
    """What changes of a hold while it is open."""

    hold_id: UUID
    wallet_id: UUID
    expires_at: datetime
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class Resolution(NamedTuple):
    """How a hold ended; `amount` is what its credits paid."""

    hold_id: UUID
    op_id: UUID
    kind: ResolutionKind
    amount: int


class UsageRow(NamedTuple):
    """What was used: part 0 when the hold was resolved, part 1 what a settlement after its expiry added."""

    hold_id: UUID
    part: int
    op_id: UUID
    wallet_id: UUID
    user_id: UUID | None
    key_id: UUID | None
    model: str
    build: str
    price_id: UUID
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost: int
    finish_reason: str
    duration_ms: int
    request_id: str


class OperationRow(NamedTuple):
    """What is remembered of an operation. `result` is JSON: the result, or what to raise the refusal with."""

    tenant: UUID
    idem_key: str
    id: UUID
    kind: str
    body_sha256: bytes
    refusal: str | None
    result: str
    actor: str


class Rollup(NamedTuple):
    """Whose usage of which day (UTC): the key of billing.usage_day."""

    wallet_id: UUID
    day: date
    model: str
    key_id: UUID | None
    user_id: UUID | None


class AuditRow(NamedTuple):
    """What somebody did to a wallet by hand, and why. `frozen` is of a freeze, `amount` of the others."""

    wallet_id: UUID
    op_id: UUID
    kind: str
    amount: int | None
    frozen: bool | None
    reason: str
    actor: str
    created_at: datetime


class ChargeDay(NamedTuple):
    """Whose charges of which day (UTC): the key of billing.charge_day."""

    wallet_id: UUID
    day: date
    key_id: UUID | None
    user_id: UUID | None


@dataclass(slots=True)
class Rows:
    """What a batch writes, besides the counters of the accounts that it touched."""

    accounts: list[AccountRow] = field(default_factory=list)
    grants: list[GrantRow] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    holds: list[HoldRow] = field(default_factory=list)
    slices: list[SliceRow] = field(default_factory=list)
    extensions: list[HoldExtensionRow] = field(default_factory=list)
    opened: dict[UUID, OpenHoldRow] = field(default_factory=dict)
    closed: list[UUID] = field(default_factory=list)
    resolutions: list[Resolution] = field(default_factory=list)
    usages: list[UsageRow] = field(default_factory=list)
    # requests, input, cached input and output tokens, cost
    rollups: dict[Rollup, list[int]] = field(default_factory=dict)
    expired_grants: list[UUID] = field(default_factory=list)
    operations: list[OperationRow] = field(default_factory=list)
    audit: list[AuditRow] = field(default_factory=list)
    charges: dict[ChargeDay, int] = field(default_factory=dict)
