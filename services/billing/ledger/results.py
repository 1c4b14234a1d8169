"""What operations come to, and how it is remembered: JSON, by the kind of operation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import orjson


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
class HoldExtended:
    """`amount` is held, and `output_tokens` are covered, in all."""

    hold_id: UUID
    amount: int
    output_tokens: int
    available: int


@dataclass(frozen=True, slots=True)
class Extended:
    """What a heartbeat did."""

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
class Charged:
    charge_id: UUID
    amount: int
    available: int


@dataclass(frozen=True, slots=True)
class Refunded:
    """`amount` was given back now; `refundable` is what is left of what was taken."""

    amount: int
    refundable: int
    receivable: int
    available: int


@dataclass(frozen=True, slots=True)
class TakenBack:
    """`amount` was taken back now, `total` in all; what of it was not there is in `receivable`."""

    amount: int
    total: int
    receivable: int
    available: int


@dataclass(frozen=True, slots=True)
class Frozen:
    frozen: bool


@dataclass(frozen=True, slots=True)
class GrantExpired:
    amount: int


Remembered = Granted | Held | HoldExtended | Settled | Voided | Charged | Refunded | TakenBack | Frozen | GrantExpired
Result = Remembered | Extended | None

_RESULTS: dict[str, type[Remembered]] = {
    "grant": Granted,
    "hold": Held,
    "extend": HoldExtended,
    "settle": Settled,
    "void": Voided,
    "expire": Settled,
    "charge": Charged,
    "refund": Refunded,
    "take_back": TakenBack,
    "freeze": Frozen,
    "expire_grant": GrantExpired,
}
_UUIDS = ("grant_id", "hold_id", "price_id", "charge_id")


def result_to_json(result: Result) -> str:
    """How a result is remembered."""
    assert result is not None
    return orjson.dumps(result, default=str).decode()


def result_from_json(kind: str, text: str) -> Result:
    """The inverse, for the kind of operation."""
    values = orjson.loads(text)
    for name in _UUIDS:
        if name in values:
            values[name] = UUID(values[name])
    if "expires_at" in values:
        values["expires_at"] = datetime.fromisoformat(values["expires_at"])
    return _RESULTS[kind](**values)
