"""Price versions: immutable, one in force at a time for a model and customer class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from services.billing.domain import Price, PriceTerms
from services.billing.repository.database import Connection, Database

_COLUMNS = """p.id, t.model, t.customer_class, p.per_request, p.input, p.cached_input, p.output,
    lower(p.validity), upper(p.validity)"""


async def in_force(database: Database, classes: Sequence[str]) -> list[Price]:
    """Every version of these customer classes in force now."""
    rows = await database.fetch(
        f"""SELECT {_COLUMNS} FROM billing.tariff t JOIN billing.price p ON p.tariff_id = t.id
        WHERE t.customer_class = ANY($1) AND p.validity @> clock_timestamp()
        ORDER BY t.model, t.customer_class""",  # noqa: S608 - a constant
        list(classes),
    )
    return [_price(row) for row in rows]


async def versions(
    database: Database, model: str | None, customer_class: str | None, before: UUID | None, limit: int
) -> list[Price]:
    """The newest publication first: a version's id grows with the time of its publication."""
    rows = await database.fetch(
        f"""SELECT {_COLUMNS} FROM billing.price p JOIN billing.tariff t ON t.id = p.tariff_id
        WHERE ($1::text IS NULL OR t.model = $1) AND ($2::text IS NULL OR t.customer_class = $2)
            AND ($3::uuid IS NULL OR p.id < $3)
        ORDER BY p.id DESC LIMIT $4""",  # noqa: S608 - a constant
        model,
        customer_class,
        before,
        limit,
    )
    return [_price(row) for row in rows]


async def current(connection: Connection, model: str, customer_class: str) -> Price | None:
    """The version in force now for exactly this class."""
    row = await connection.fetchrow(
        f"""SELECT {_COLUMNS} FROM billing.tariff t JOIN billing.price p ON p.tariff_id = t.id
        WHERE t.model = $1 AND t.customer_class = $2 AND p.validity @> clock_timestamp()""",  # noqa: S608 - a constant
        model,
        customer_class,
    )
    return _price(row) if row else None


async def insert(connection: Connection, price: Price, created_by: str) -> None:
    """A version from its `valid_from` on; the open-ended one in force until then is closed.

    Raises ExclusionViolationError when another version is valid at some time after that.
    """
    await connection.execute(
        "INSERT INTO billing.tariff (model, customer_class) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        price.model,
        price.customer_class,
    )
    tariff_id = await connection.fetchval(
        "SELECT id FROM billing.tariff WHERE model = $1 AND customer_class = $2",
        price.model,
        price.customer_class,
    )
    await connection.execute(
        """UPDATE billing.price SET validity = tstzrange(lower(validity), $2)
        WHERE tariff_id = $1 AND upper_inf(validity) AND lower(validity) < $2""",
        tariff_id,
        price.valid_from,
    )
    await connection.execute(
        """INSERT INTO billing.price
            (id, tariff_id, per_request, input, cached_input, output, validity, created_at, created_by)
        VALUES ($1, $2, $3, $4, $5, $6, tstzrange($7, NULL), clock_timestamp(), $8)""",
        price.id,
        tariff_id,
        price.terms.per_request,
        price.terms.input,
        price.terms.cached_input,
        price.terms.output,
        price.valid_from,
        created_by,
    )


def _price(row: Any) -> Price:
    return Price(row[0], row[1], row[2], PriceTerms(*row[3:7]), row[7], row[8])
