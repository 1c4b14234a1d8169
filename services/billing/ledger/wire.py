"""Operations and their results as bytes, from the process that was asked to the one that leads the wallet's shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

import orjson

from services.billing.domain import Usage
from services.billing.ledger import operations, results
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from shared.errors import InvalidRequest
from shared.ids import as_uuid

_KINDS: dict[str, type[Operation]] = {
    cls.kind: cls
    for cls in (
        operations.OpenWallet,
        operations.GrantCredits,
        operations.Charge,
        operations.Refund,
        operations.TakeBack,
        operations.Freeze,
        operations.PlaceHold,
        operations.Heartbeat,
        operations.ExtendHold,
        operations.Settle,
        operations.Void,
        operations.ExpireHold,
        operations.ExpireGrant,
    )
}
# How a field is read, by what its class says that it is.
_READERS: dict[str, Callable[[Any], Any]] = {
    "UUID": as_uuid,
    "datetime": datetime.fromisoformat,
    "Usage": lambda value: Usage(**value),
}


def operation_to_bytes(operation: Operation) -> bytes:
    return orjson.dumps({"kind": operation.kind, **asdict(operation)}, default=str)


def operation_from_bytes(data: bytes) -> Operation:
    """The inverse. Raises InvalidRequest for what no version of this program has sent."""
    try:
        values = orjson.loads(data)
        cls = _KINDS[values.pop("kind")]
        return cls(**{f.name: _read(str(f.type), values.pop(f.name)) for f in fields(cls)})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InvalidRequest("This is not an operation.", detail=type(e).__name__) from e


def _read(declared: str, value: Any) -> Any:
    reader = _READERS.get(declared.removesuffix(" | None"))
    return value if reader is None or value is None else reader(value)


def result_to_bytes(operation: Operation, result: Result) -> bytes:
    """An extension of a heartbeat has its own form: it is not remembered."""
    if result is None:
        return b""
    if isinstance(result, results.Extended):
        return result.expires_at.isoformat().encode()
    return results.result_to_json(result).encode()


def result_from_bytes(operation: Operation, data: bytes) -> Result:
    if not data:
        return None
    if isinstance(operation, operations.Heartbeat):
        return results.Extended(datetime.fromisoformat(data.decode()))
    return results.result_from_json(operation.kind, data.decode())
