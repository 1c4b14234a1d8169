"""Everything that the ledger knows of one request, and whether it adds up: what an operator needs for a complaint."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg
import orjson

from services.billing.repository.verification import Difference, Report, hold_differences, wallets_step
from shared.database import dsn

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_MS = 60_000

_REQUEST = """
    SELECT jsonb_build_object(
        'hold', to_jsonb(h),
        'price', (SELECT to_jsonb(p) || jsonb_build_object('model', t.model, 'customer_class', t.customer_class)
            FROM billing.price p JOIN billing.tariff t ON t.id = p.tariff_id WHERE p.id = h.price_id),
        'slices', (SELECT jsonb_agg(to_jsonb(s) - 'hold_id' ORDER BY s.position)
            FROM billing.hold_slice s WHERE s.hold_id = h.id),
        'extensions', (SELECT jsonb_agg(to_jsonb(e) - 'hold_id' ORDER BY e.number)
            FROM billing.hold_extension e WHERE e.hold_id = h.id),
        'open', (SELECT to_jsonb(o) - 'hold_id' - 'wallet_id' FROM billing.open_hold o WHERE o.hold_id = h.id),
        'resolution', (SELECT to_jsonb(r) - 'hold_id' FROM billing.hold_resolution r WHERE r.hold_id = h.id),
        'usage', (SELECT jsonb_agg(to_jsonb(u) - 'hold_id' - 'wallet_id' ORDER BY u.part)
            FROM billing.usage u WHERE u.hold_id = h.id),
        'transfers', (SELECT jsonb_agg(to_jsonb(t) - 'hold_id' - 'wallet_id' ORDER BY t.wallet_seq)
            FROM billing.transfer t WHERE t.hold_id = h.id),
        'operations', (SELECT jsonb_agg(to_jsonb(o) - 'body_sha256' ORDER BY o.created_at, o.id)
            FROM billing.op o WHERE (o.tenant = h.wallet_id AND o.idem_key = ANY(ARRAY[
                'hold:' || h.id, 'settle:' || h.id, 'void:' || h.id, 'expire:' || h.id, 'late:' || h.id]))
                OR (o.tenant = h.wallet_id AND o.idem_key = ANY(ARRAY(
                    SELECT 'extend:' || h.id || ':' || n FROM generate_series(1, 1000) n)))
                OR o.id IN (SELECT t.op_id FROM billing.transfer t WHERE t.hold_id = h.id)))
    FROM billing.hold h WHERE h.id = $1"""


async def request(url: str, hold_id: UUID) -> tuple[dict[str, Any], list[Difference]] | None:
    """A hold with all that came of it, amounts in nano-credits, and what does not add up. None for no such hold."""
    connection = await _connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            found = await connection.fetchval(_REQUEST, hold_id)
            if found is None:
                return None
            return orjson.loads(found), await hold_differences(connection, hold_id)
    finally:
        await connection.close()


async def wallet(url: str, wallet_id: UUID) -> Report:
    """Replay one wallet; its requests are `request`'s."""
    connection = await _connect(url)
    try:
        report, before, begun = Report(), UUID(int=wallet_id.int - 1), None
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            while True:
                step = await wallets_step(connection, before, begun, wallets_max=1)
                if step.after is not None and step.begun is None and step.after != wallet_id and step.after != before:
                    return Report()  # the next one: there is no such wallet
                report.add(step)
                if step.begun is None:
                    return report
                begun = step.begun
    finally:
        await connection.close()


async def _connect(url: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn(url), timeout=CONNECT_TIMEOUT_S)
    await connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
    return connection
