"""The operations of the ledger and their results: plain data.

An operation belongs to a tenant and has a key there. The first one with a key decides; the same again gets the same
result, and the same key with another `body()` is refused. Only `Heartbeat` and `OpenWallet` are not remembered: they
do the same however often they come.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from services.billing.domain import Usage


@dataclass(frozen=True, slots=True)
class Operation:
    """What they all have: the wallet that they change."""

    kind: ClassVar[str] = ""
    remembered: ClassVar[bool] = True
    opens_wallet: ClassVar[bool] = False

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

    def body(self) -> dict[str, Any]:
        return asdict(self)

    def body_sha256(self) -> bytes:
        return hashlib.sha256(json.dumps(self.body(), sort_keys=True, default=str).encode()).digest()


@dataclass(frozen=True, slots=True)
class OpenWallet(Operation):
    """Make sure that there is a wallet. Its result is None."""

    kind = "open"
    remembered = False
    opens_wallet = True

    @property
    def key(self) -> str:
        return f"open:{self.wallet_id}"


@dataclass(frozen=True, slots=True)
class GrantCredits(Operation):
    """Put credits into the wallet. `account_id` is made by whoever makes the operation and is not part of its body."""

    kind = "grant"
    opens_wallet = True

    account_id: UUID
    amount: int
    source: str
    reason: str
    priority: int
    expires_at: datetime | None
    idempotency_tenant: UUID
    idempotency_key: str
    granted_by: str

    @property
    def tenant(self) -> UUID:
        return self.idempotency_tenant

    @property
    def key(self) -> str:
        return self.idempotency_key

    @property
    def actor(self) -> str:
        return self.granted_by

    def body(self) -> dict[str, Any]:
        body = asdict(self)
        del body["account_id"]
        return body


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


@dataclass(frozen=True, slots=True)
class Granted:
    grant_id: UUID
    amount: int
    available: int
    receivable: int


@dataclass(frozen=True, slots=True)
class Held:
    hold_id: UUID
    amount: int
    output_tokens: int
    price_id: UUID
    expires_at: datetime
    available: int


@dataclass(frozen=True, slots=True)
class Extended:
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Settled:
    """`cost` of the usage in all; `settled` was taken from credits; `receivable` is what the wallet owes now."""

    cost: int
    settled: int
    receivable: int
    available: int


@dataclass(frozen=True, slots=True)
class Voided:
    released: int


@dataclass(frozen=True, slots=True)
class GrantExpired:
    amount: int


Result = Granted | Held | Extended | Settled | Voided | GrantExpired | None

_RESULTS: dict[str, type[Granted | Held | Settled | Voided | GrantExpired]] = {
    "grant": Granted,
    "hold": Held,
    "settle": Settled,
    "void": Voided,
    "expire": Settled,
    "expire_grant": GrantExpired,
}
_UUIDS = ("grant_id", "hold_id", "price_id")


def result_to_json(result: Result) -> str:
    """How a result is remembered."""
    assert result is not None
    return json.dumps(asdict(result), default=str)


def result_from_json(kind: str, text: str) -> Result:
    """The inverse, for the kind of operation."""
    fields = json.loads(text)
    for name in fields.keys() & set(_UUIDS):
        fields[name] = UUID(fields[name])
    if "expires_at" in fields:
        fields["expires_at"] = datetime.fromisoformat(fields["expires_at"])
    return _RESULTS[kind](**fields)
