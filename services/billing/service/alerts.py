"""Tells customers when a balance falls below what they named: once each time, armed again when it is back above.

A task looks at the thresholds whose wallets have moved: nothing of this is in the way of a request. A balance that
fell and rose again between two looks is not reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

from services.billing.ledger.operations import OpenWallet
from services.billing.ledger.writer import Ledger
from services.billing.repository import alerts as repository
from services.billing.repository.database import Connection, Database
from services.billing.service.author import Author, once
from services.billing.service.webhooks import emit
from shared.money import format_credits
from shared.telemetry import get_logger

log = get_logger(__name__)

EVENT = "wallet.balance_low"
LOOKED_AT_ONCE = 200


class Alerts:
    """One for the life of the process."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self._database = database
        self._ledger = ledger

    async def thresholds(self, org_id: UUID) -> list[tuple[int, bool]]:
        """(nano-credits, whether the balance is below), the largest first."""
        return await repository.thresholds(self._database, org_id)

    async def set(self, author: Author, org_id: UUID, amounts: Sequence[int]) -> list[tuple[int, bool]]:
        """Exactly these thresholds, in place of what there was."""
        await self._ledger.submit(OpenWallet(org_id))
        wanted = sorted(set(amounts))

        async def work(connection: Connection) -> dict[str, object]:
            await repository.replace(connection, org_id, wanted)
            return {}

        await once(self._database, author, "alerts", {"org": org_id, "amounts": wanted}, work)
        return await self.thresholds(org_id)

    async def run(self, interval_s: float) -> None:
        """Look for ever."""
        while True:
            if await self.look() < LOOKED_AT_ONCE:
                await asyncio.sleep(interval_s)

    async def look(self) -> int:
        """One look; how many thresholds there were to look at."""

        async def work(connection: Connection) -> int:
            changed = await repository.lock_changed(connection, LOOKED_AT_ONCE)
            for one in changed:
                is_below = one.balance < one.amount
                if is_below and not one.is_below:
                    data = {
                        "org_id": str(one.wallet_id),
                        "threshold": format_credits(one.amount),
                        "balance": format_credits(one.balance),
                    }
                    await emit(connection, one.wallet_id, EVENT, data)
                    log.info("balance_low", wallet_id=str(one.wallet_id))
                await repository.see(connection, one, is_below=is_below)
            return len(changed)

        return await self._database.transaction(work)
