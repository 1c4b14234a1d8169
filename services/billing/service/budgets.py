"""What a key or a member may spend of the wallet in a day or a month. The ledger decides on it when it holds."""

from __future__ import annotations

from uuid import UUID

from services.billing.domain import Budget, BudgetSubject
from services.billing.errors import OwnBudget, TooManyBudgets
from services.billing.ledger.operations import OpenWallet
from services.billing.ledger.writer import Ledger
from services.billing.repository import budgets as repository
from services.billing.repository.database import Connection, Database
from services.billing.service.author import Author, once

BUDGETS_MAX = 1_000  # rows of a wallet, a day's and a month's counted apart: the ledger reads all of them at once


class Budgets:
    """One for the life of the process."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self._database = database
        self._ledger = ledger

    async def all(self, org_id: UUID) -> list[Budget]:
        """Every budget of the wallet."""
        return await repository.budgets(self._database, org_id)

    async def set(
        self, author: Author, org_id: UUID, subject: BudgetSubject, subject_id: UUID, day: int | None, month: int | None
    ) -> Budget:
        """Give a key or a member these limits, None for none, in place of what they had. In force for the next hold.

        Raises OwnBudget for a key that asks for itself or for whose it is; TooManyBudgets.
        """
        if author.key_id is not None and subject_id in (author.key_id, author.user_id):
            raise OwnBudget()
        await self._ledger.submit(OpenWallet(org_id))
        body = {"org": org_id, "subject": subject, "id": subject_id, "day": day, "month": month}

        async def work(connection: Connection) -> dict[str, object]:
            for period, amount in (("day", day), ("month", month)):
                await repository.put(connection, org_id, subject, subject_id, period, amount)
            # Who has set one holds the wallet's row: nobody else counts meanwhile.
            if (day, month) != (None, None) and await repository.count(connection, org_id) > BUDGETS_MAX:
                raise TooManyBudgets()
            return {}

        await once(self._database, author, "budget", body, work)
        found = [b for b in await self.all(org_id) if (b.subject, b.subject_id) == (subject, subject_id)]
        return found[0] if found else Budget(subject, subject_id, None, None)
