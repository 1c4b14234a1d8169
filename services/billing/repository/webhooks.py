"""Webhooks: endpoints, the outbox, and deliveries, which are leased by whoever sends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.billing.repository.database import Connection, Database

RANKED_MAX = 5_000  # deliveries that one lease looks at, however long the queue is


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a wallet's events go, and which of its secrets sign them."""

    id: UUID
    wallet_id: UUID
    url: str
    secret_kid: str
    secret_version: int
    previous_until: datetime | None
    disabled_reason: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one endpoint."""

    event_id: UUID
    type: str
    status: str
    attempts: int
    due_at: datetime
    response_status: int | None
    error: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Leased:
    """A delivery that is ours to try until its lease is over. `signs_before` tells whether the version before signs."""

    event_id: UUID
    endpoint_id: UUID
    attempts: int
    body: str
    url: str
    secret_kid: str
    secret_version: int
    signs_before: bool


_ENDPOINTS = """
    SELECT id, wallet_id, url, secret_kid, secret_version, previous_until, disabled_reason, created_at
    FROM billing.webhook_endpoint WHERE wallet_id = $1 ORDER BY id"""


async def endpoints(database: Database, org_id: UUID) -> list[Endpoint]:
    """Oldest first."""
    return [Endpoint(*row) for row in await database.fetch(_ENDPOINTS, org_id)]


async def lock_endpoints(connection: Connection, org_id: UUID) -> list[Endpoint]:
    """The same, while nobody else changes any of them: until the end of the transaction."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"webhooks:{org_id}")
    rows = await connection.fetch(_ENDPOINTS, org_id)
    return [Endpoint(*row) for row in rows]


async def enabled_endpoints(connection: Connection, org_id: UUID) -> list[UUID]:
    """Those that get the wallet's events. No lock: this may be asked for many wallets in one transaction."""
    rows = await connection.fetch(_ENDPOINTS, org_id)
    return [endpoint.id for endpoint in (Endpoint(*row) for row in rows) if endpoint.disabled_reason is None]


async def insert_endpoint(connection: Connection, endpoint_id: UUID, org_id: UUID, url: str, kid: str) -> None:
    await connection.execute(
        """INSERT INTO billing.webhook_endpoint (id, wallet_id, url, secret_kid, secret_version, created_at)
        VALUES ($1, $2, $3, $4, 1, clock_timestamp())""",
        endpoint_id,
        org_id,
        url,
        kid,
    )


async def delete_endpoint(connection: Connection, endpoint_id: UUID) -> None:
    """With its deliveries."""
    await connection.execute("DELETE FROM billing.webhook_endpoint WHERE id = $1", endpoint_id)


async def next_secret(connection: Connection, endpoint_id: UUID, grace_s: int) -> None:
    """A new secret under the same key; the one before signs too for a while."""
    await connection.execute(
        """UPDATE billing.webhook_endpoint SET secret_version = secret_version + 1,
            previous_until = clock_timestamp() + make_interval(secs => $2) WHERE id = $1""",
        endpoint_id,
        grace_s,
    )


async def enable(connection: Connection, endpoint_id: UUID) -> None:
    """Deliver what comes from now on."""
    await connection.execute("UPDATE billing.webhook_endpoint SET disabled_reason = NULL WHERE id = $1", endpoint_id)


async def disable(database: Database, endpoint_id: UUID, reason: str) -> None:
    """Deliver no more, and give up what is on its way."""
    await database.fetchrow(
        """WITH endpoint AS (UPDATE billing.webhook_endpoint SET disabled_reason = $2 WHERE id = $1 RETURNING id)
        UPDATE billing.webhook_delivery SET status = 'failed', error = 'disabled', updated_at = clock_timestamp()
        WHERE endpoint_id = (SELECT id FROM endpoint) AND status = 'pending' RETURNING event_id""",
        endpoint_id,
        reason,
    )


async def emit(
    connection: Connection, event_id: UUID, org_id: UUID, kind: str, body: str, endpoint_ids: Sequence[UUID]
) -> None:
    """Put an event into the outbox, in the transaction of what it tells of."""
    await connection.execute(
        """INSERT INTO billing.webhook_event (id, wallet_id, type, body, created_at)
        VALUES ($1, $2, $3, $4, clock_timestamp())""",
        event_id,
        org_id,
        kind,
        body,
    )
    await connection.execute(
        """INSERT INTO billing.webhook_delivery (event_id, endpoint_id, status, attempts, due_at, updated_at)
        SELECT $1, id, 'pending', 0, now, now FROM unnest($2::uuid[]) AS id, clock_timestamp() AS now""",
        event_id,
        list(endpoint_ids),
    )


async def deliveries(database: Database, endpoint_id: UUID, limit: int) -> list[Delivery]:
    """Newest first."""
    rows = await database.fetch(
        """SELECT d.event_id, e.type, d.status, d.attempts, d.due_at, d.response_status, d.error, e.created_at
        FROM billing.webhook_delivery d JOIN billing.webhook_event e ON e.id = d.event_id
        WHERE d.endpoint_id = $1 ORDER BY d.event_id DESC LIMIT $2""",
        endpoint_id,
        limit,
    )
    return [Delivery(*row) for row in rows]


async def lease(database: Database, lease_s: float, per_endpoint: int, limit: int) -> list[Leased]:
    """Deliveries that are due, the longest first, few of one endpoint. Until the lease is over nobody else gets them;
    who dies meanwhile has made an attempt.
    """
    rows = await database.fetch(
        """WITH due AS (
            SELECT event_id, endpoint_id FROM (
                SELECT d.event_id, d.endpoint_id, d.due_at,
                    row_number() OVER (PARTITION BY d.endpoint_id ORDER BY d.due_at) AS place
                FROM (
                    SELECT event_id, endpoint_id, due_at FROM billing.webhook_delivery
                    WHERE status = 'pending' AND due_at <= clock_timestamp() ORDER BY due_at LIMIT $4) d) ranked
            WHERE place <= $2 ORDER BY due_at LIMIT $3),
        locked AS (
            SELECT d.event_id, d.endpoint_id FROM billing.webhook_delivery d JOIN due USING (event_id, endpoint_id)
            WHERE d.status = 'pending' AND d.due_at <= clock_timestamp() FOR UPDATE OF d SKIP LOCKED)
        UPDATE billing.webhook_delivery d SET attempts = d.attempts + 1,
            due_at = clock_timestamp() + make_interval(secs => $1), updated_at = clock_timestamp()
        FROM locked l, billing.webhook_event e, billing.webhook_endpoint w
        WHERE d.event_id = l.event_id AND d.endpoint_id = l.endpoint_id AND e.id = d.event_id AND w.id = d.endpoint_id
        RETURNING d.event_id, d.endpoint_id, d.attempts, e.body, w.url, w.secret_kid, w.secret_version,
            coalesce(w.previous_until > clock_timestamp(), false)""",
        lease_s,
        per_endpoint,
        limit,
        RANKED_MAX,
    )
    return [Leased(*row) for row in rows]


async def record(
    database: Database,
    leased: Leased,
    *,
    status: str,
    retry_in_s: float,
    response_status: int | None,
    error: str | None,
) -> None:
    """What came of an attempt; an earlier one's late answer does not count."""
    await database.fetchrow(
        """UPDATE billing.webhook_delivery SET status = $4, due_at = clock_timestamp() + make_interval(secs => $5),
            response_status = $6, error = $7, updated_at = clock_timestamp()
        WHERE event_id = $1 AND endpoint_id = $2 AND attempts = $3 RETURNING event_id""",
        leased.event_id,
        leased.endpoint_id,
        leased.attempts,
        status,
        retry_in_s,
        response_status,
        error,
    )


async def forget(database: Database, before: UUID, limit: int) -> int:
    """Remove events that are older than this id, with their deliveries; how many. Ids grow with time."""
    rows = await database.fetch(
        """DELETE FROM billing.webhook_event WHERE id IN (
            SELECT id FROM billing.webhook_event WHERE id < $1 ORDER BY id LIMIT $2) RETURNING id""",
        before,
        limit,
    )
    return len(rows)
