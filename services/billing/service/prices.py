"""What requests cost, and the publication of new prices."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from uuid import UUID

import asyncpg

from services.billing.domain import Price, PriceTerms, customer_classes
from services.billing.errors import PriceOverlap
from services.billing.repository import prices as repository
from services.billing.repository.database import Connection, Database
from services.billing.service.author import Author, once
from shared.errors import InvalidRequest
from shared.ids import uuid7


class Prices:
    """One for the life of the process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def in_force(self, org_id: UUID | None, plan: str) -> list[Price]:
        """The price that a customer gets for each model now."""
        classes = customer_classes(org_id, plan)
        best: dict[str, Price] = {}
        for price in await repository.in_force(self._database, classes):
            rival = best.get(price.model)
            if rival is None or classes.index(price.customer_class) < classes.index(rival.customer_class):
                best[price.model] = price
        return [best[model] for model in sorted(best)]

    async def versions(
        self, *, model: str | None, customer_class: str | None, before: UUID | None, limit: int
    ) -> tuple[list[Price], UUID | None]:
        """Every version, past and scheduled ones too, the newest publication first; and where the next page begins."""
        rows = await repository.versions(self._database, model, customer_class, before, limit + 1)
        return rows[:limit], rows[limit - 1].id if len(rows) > limit else None

    async def publish(
        self, author: Author, model: str, customer_class: str, terms: PriceTerms, effective_from: datetime | None
    ) -> Price:
        """A new version from a time on, now if none is given. Idempotent by the author's key.

        Raises PriceOverlap when another version is scheduled for then or later, InvalidRequest for a time before now.
        """
        body = {"model": model, "class": customer_class, "terms": asdict(terms), "from": effective_from}

        async def work(connection: Connection) -> dict[str, object]:
            now: datetime = await connection.fetchval("SELECT clock_timestamp()")
            valid_from = effective_from or now
            if valid_from < now:
                raise InvalidRequest("effective_from lies in the past.", param="effective_from")
            price = Price(uuid7(), model, customer_class, terms, valid_from)
            await _insert(connection, price, author.actor)
            return {"id": price.id, "valid_from": valid_from.isoformat()}

        published = await once(self._database, author, "price", body, work)
        valid_from = datetime.fromisoformat(published["valid_from"])
        return Price(UUID(published["id"]), model, customer_class, terms, valid_from)

    async def bring_up_to_date(self, model: str, customer_class: str, terms: PriceTerms, actor: str) -> Price | None:
        """Publish, effective now, unless the price in force says the same: then None. Raises PriceOverlap."""

        async def work(connection: Connection) -> Price | None:
            current = await repository.current(connection, model, customer_class)
            if current is not None and current.terms == terms:
                return None
            now: datetime = await connection.fetchval("SELECT clock_timestamp()")
            price = Price(uuid7(), model, customer_class, terms, now)
            await _insert(connection, price, actor)
            return price

        return await self._database.transaction(work)


async def _insert(connection: Connection, price: Price, actor: str) -> None:
    try:
        await repository.insert(connection, price, actor)
    except asyncpg.ExclusionViolationError as e:
        raise PriceOverlap() from e
