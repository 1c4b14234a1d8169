"""Who writes, under which idempotency key; and the door through which everything that is no ledger operation is
written once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from services.billing.errors import IdempotencyMismatch
from services.billing.repository import operations
from services.billing.repository.database import Connection, Database


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes, by which API key if any, and the idempotency key that they sent for their organisation."""

    tenant: UUID
    user_id: UUID | None
    key_id: UUID | None
    idempotency_key: str

    @property
    def actor(self) -> str:
        """For the audit."""
        return f"key:{self.key_id}" if self.key_id else f"user:{self.user_id}"

    @property
    def key(self) -> str:
        """Clients' keys have a prefix of their own: they never meet the ledger's."""
        return f"key:{self.idempotency_key}"


async def once(
    database: Database,
    author: Author,
    kind: str,
    body: Mapping[str, object],
    work: Callable[[Connection], Awaitable[Mapping[str, object]]],
) -> dict[str, Any]:
    """Do the work in a transaction that remembers its result under the author's key; the result as JSON has it.

    The same again waits for the first and gets its result. Refusals are raised, and not remembered: nothing was done.
    Raises IdempotencyMismatch for another kind or body, LedgerUnavailable, and whatever the work raises.
    """
    digest = hashlib.sha256(json.dumps([kind, body], sort_keys=True, default=str).encode()).digest()

    async def attempt(connection: Connection) -> dict[str, Any]:
        await operations.lock_key(connection, author.tenant, author.key)
        remembered = await operations.find(connection, author.tenant, author.key)
        if remembered is not None:
            if remembered.body_sha256 != digest:
                raise IdempotencyMismatch()
            return dict(json.loads(remembered.result))
        result = json.dumps(await work(connection), default=str)
        await operations.insert(connection, author.tenant, author.key, kind, digest, result, author.actor)
        return dict(json.loads(result))

    return await database.transaction(attempt)
