"""The operations of the ledger and their results: plain data.

An operation belongs to a tenant and has a key there. The first one with a key decides; the same again gets the same
result, and the same key with another `body()` is refused. Only `Heartbeat` and `OpenWallet` are not remembered: they
do the same however often they come. `services.billing.ledger.results` has how results are remembered.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from datetime import datetime
from typing import ClassVar
from uuid import UUID

import orjson

from services.billing.domain import Usage

GRANT_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Operation:
    """What they all have: the wallet that they change."""

    kind: ClassVar[str] = ""
    remembered: ClassVar[bool] = True
    opens_wallet: ClassVar[bool] = False
    # Fields made anew by whoever sends the operation again: not what it says.
    incidental: ClassVar[frozenset[str]] = frozenset()

    wallet_id: UUID

    @property
    def tenant(self) -> UUID:
        """Whose key it is."""
        return self.wallet_id

    @property
    def key(self) -> str:
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that this operation may have been remembered under."""
        return (self.key,)

    @property
    def actor(self) -> str:
        """Who caused it, for the audit."""
        return "service"

    def body(self) -> tuple[object, ...]:
        """What makes it another operation, in a fixed order."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in self.incidental)

    def body_sha256(self) -> bytes:
        return hashlib.sha256(orjson.dumps(self.body(), default=str)).digest()


@dataclass(frozen=True, slots=True)
class AuthoredOperation(Operation):
    """What somebody asked for under an idempotency key of their own."""

    idempotency_tenant: UUID
    idempotency_key: str
    author: str

    @property
    def tenant(self) -> UUID:
        return self.idempotency_tenant

    @property
    def key(self) -> str:
        return self.idempotency_key

    @property
    def actor(self) -> str:
        return self.author


@dataclass(frozen=True, slots=True)
class OpenWallet(Operation):
    """Make sure that there is a wallet, and that the person who asks has had sign-up credits. Its result is None."""

    kind = "open"
    remembered = False
    opens_wallet = True

    user_id: UUID | None = None

    @property
    def key(self) -> str:
        return f"open:{self.wallet_id}"


@dataclass(frozen=True, slots=True)
class GrantCredits(AuthoredOperation):
    """Put credits into the wallet. `account_id` is made by whoever makes the operation."""

    kind = "grant"
    opens_wallet = True
    incidental = frozenset({"account_id"})

    account_id: UUID
    amount: int
    source: str
    reason: str
    priority: int
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Charge(AuthoredOperation):
    """Take an amount now, whole or not at all, without a hold: what was used has no price by tokens.

    `charge_id` (UUIDv7) names it in its transfers, where a hold's id would be, and in a refund.
    """

    kind = "charge"
    incidental = frozenset({"charge_id", "user_id", "key_id"})

    charge_id: UUID
    amount: int
    reason: str
    user_id: UUID | None = None
    key_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Refund(AuthoredOperation):
    """Give back up to what a hold or a charge took, to the grants it was taken from, the last one first.

    `source_id` is the hold's or the charge's id; `amount` None is all that is left. What was owed and not paid yet is
    forgiven first; what has been paid of a debt since comes back in a grant of its own, `account_id`.
    """

    kind = "refund"
    incidental = frozenset({"account_id"})

    source_id: UUID
    account_id: UUID
    amount: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class TakeBack(AuthoredOperation):
    """Take credits of a grant back, since its money went back: `total` in all, however often it comes.

    What is not free of the grant any more is owed.
    """

    kind = "take_back"

    grant_id: UUID
    total: int
    reason: str


@dataclass(frozen=True, slots=True)
class Freeze(AuthoredOperation):
    """Refuse new holds and charges of the wallet, or allow them again. What is in flight can be settled."""

    kind = "freeze"
    opens_wallet = True

    frozen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PlaceHold(Operation):
    """Reserve the worst case of a request."""

    kind = "hold"
    opens_wallet = True

    hold_id: UUID
    user_id: UUID | None
    key_id: UUID | None
    plan: str
    model: str
    worst_case: Usage
    clamp: bool
    ttl_ms: int
    request_id: str

    @property
    def key(self) -> str:
        return f"hold:{self.hold_id}"

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}" if self.key_id else f"user:{self.user_id}"

    def body(self) -> tuple[object, ...]:
        return (
            self.wallet_id,
            self.hold_id,
            self.user_id,
            self.key_id,
            self.plan,
            self.model,
            self.worst_case,
            self.clamp,
            self.ttl_ms,
            self.request_id,
        )


@dataclass(frozen=True, slots=True)
class Heartbeat(Operation):
    """Extend an open hold, and store the usage so far."""

    kind = "heartbeat"
    remembered = False

    hold_id: UUID
    usage: Usage
    ttl_ms: int

    @property
    def key(self) -> str:
        return f"heartbeat:{self.hold_id}"


@dataclass(frozen=True, slots=True)
class ExtendHold(Operation):
    """Have an open hold cover more output tokens: as many as can be had, up to `output_tokens` in all.

    `number` tells the attempts of one hold apart: a refusal is remembered, so who asks again later counts on.
    """

    kind = "extend"

    hold_id: UUID
    number: int
    output_tokens: int

    @property
    def key(self) -> str:
        return f"extend:{self.hold_id}:{self.number}"


@dataclass(frozen=True, slots=True)
class Settle(Operation):
    """Post what was used. After an expiry it posts the remainder, remembered as `late:<hold>`."""

    kind = "settle"

    hold_id: UUID
    usage: Usage
    build: str
    finish_reason: str
    duration_ms: int

    @property
    def key(self) -> str:
        return f"settle:{self.hold_id}"

    @property
    def late_key(self) -> str:
        return f"late:{self.hold_id}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, self.late_key)

    def body(self) -> tuple[object, ...]:
        return (self.wallet_id, self.hold_id, self.usage, self.build, self.finish_reason, self.duration_ms)


@dataclass(frozen=True, slots=True)
class Void(Operation):
    """Release a hold whole. `reason` is for the audit."""

    kind = "void"

    hold_id: UUID
    reason: str

    @property
    def key(self) -> str:
        return f"void:{self.hold_id}"


@dataclass(frozen=True, slots=True)
class ExpireHold(Operation):
    """Settle the last reported usage of a hold whose time is over."""

    kind = "expire"

    hold_id: UUID

    @property
    def key(self) -> str:
        return f"expire:{self.hold_id}"


@dataclass(frozen=True, slots=True)
class ExpireGrant(Operation):
    """Move what is left of a grant, and not held, to breakage."""

    kind = "expire_grant"

    account_id: UUID

    @property
    def key(self) -> str:
        return f"expire-grant:{self.account_id}"
