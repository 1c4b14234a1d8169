"""Kept conversations. Every statement names the organisation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy import Select, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncEngine

from services.chat.domain.stored import Kind, Statistics, Stored, Wanted
from services.chat.repository import available
from services.chat.tables import retention, stored

EXPORT_BATCH = 100
_SHOWN = [c for c in stored.columns if c.name != "expires_at"]


class StoredRepository:
    """Rows of chat.stored and chat.retention."""

    def __init__(self, engine: AsyncEngine, *, retention_days: int) -> None:
        self._engine = engine
        self._retention_days = retention_days

    async def save(self, item: Stored) -> None:
        """Keep it for as long as its organisation keeps things."""
        days = await self.retention_days(item.org_id)
        row = {**asdict(item), "expires_at": item.created_at + timedelta(days=days)}
        with available():
            async with self._engine.begin() as connection:
                await connection.execute(insert(stored).values(row))

    async def get(self, org_id: str, kind: Kind, id_: str) -> Stored | None:
        statement = select(*_SHOWN).where(*_one(org_id, kind, id_), stored.c.expires_at > func.now())
        with available():
            async with self._engine.connect() as connection:
                row = (await connection.execute(statement)).mappings().one_or_none()
        return _stored(row) if row is not None else None

    async def page(self, org_id: str, wanted: Wanted) -> tuple[list[Stored], bool]:
        """A page, and whether there is more. An `after` that is not there begins at the beginning."""
        with available():
            async with self._engine.connect() as connection:
                statement = _filtered(org_id, wanted).limit(wanted.limit + 1)
                if wanted.after is not None:
                    place = select(stored.c.created_at).where(*_one(org_id, wanted.kind, wanted.after))
                    at = (await connection.execute(place)).scalar_one_or_none()
                    if at is not None:
                        statement = statement.where(_beyond(at, wanted))
                rows = (await connection.execute(statement)).mappings().all()
        return [_stored(r) for r in rows[: wanted.limit]], len(rows) > wanted.limit

    async def all(self, org_id: str, kind: Kind) -> AsyncIterator[Stored]:
        """Everything of a kind, oldest first, a batch at a time."""
        after: str | None = None
        while True:
            items, more = await self.page(org_id, Wanted(kind, EXPORT_BATCH, after, "asc"))
            for item in items:
                yield item
            if not more:
                return
            after = items[-1].id

    async def set_metadata(self, org_id: str, kind: Kind, id_: str, metadata: Mapping[str, str]) -> bool:
        """False when it is not there. The document shows what the row says."""
        statement = update(stored).where(*_one(org_id, kind, id_)).values(metadata=dict(metadata))
        return await self._changed(statement)

    async def delete(self, org_id: str, kind: Kind, id_: str) -> bool:
        """False when it was not there."""
        return await self._changed(delete(stored).where(*_one(org_id, kind, id_)))

    async def statistics(self, org_id: str) -> list[Statistics]:
        """By user and model, over everything that is kept."""
        statement = (
            select(
                stored.c.user_id,
                stored.c.model,
                func.count().label("completions"),
                func.sum(stored.c.input_tokens).label("input_tokens"),
                func.sum(stored.c.output_tokens).label("output_tokens"),
                func.coalesce(func.sum(stored.c.settled_nano), 0).label("settled_nano"),
                func.round(func.avg(stored.c.duration_ms)).label("mean_duration_ms"),
            )
            .where(stored.c.org_id == org_id, stored.c.expires_at > func.now())
            .group_by(stored.c.user_id, stored.c.model)
            .order_by(stored.c.user_id, stored.c.model)
        )
        with available():
            async with self._engine.connect() as connection:
                rows = (await connection.execute(statement)).all()
        return [Statistics(r[0], r[1], *(int(value) for value in r[2:])) for r in rows]

    async def retention_days(self, org_id: str) -> int:
        with available():
            async with self._engine.connect() as connection:
                found = await connection.execute(select(retention.c.days).where(retention.c.org_id == org_id))
                return int(found.scalar_one_or_none() or self._retention_days)

    async def set_retention_days(self, org_id: str, days: int) -> None:
        """From now on, and for what is kept already."""
        kept = timedelta(days=days)
        with available():
            async with self._engine.begin() as connection:
                row = upsert(retention).values(org_id=org_id, days=days)
                await connection.execute(row.on_conflict_do_update(index_elements=["org_id"], set_={"days": days}))
                mine = update(stored).where(stored.c.org_id == org_id)
                await connection.execute(mine.values(expires_at=stored.c.created_at + kept))

    async def purge(self, limit: int) -> int:
        """Delete what has expired, at most `limit` rows; how many."""
        due = select(stored.c.id).where(stored.c.expires_at <= func.now()).limit(limit)
        with available():
            async with self._engine.begin() as connection:
                return (await connection.execute(delete(stored).where(stored.c.id.in_(due)))).rowcount

    async def _changed(self, statement: Any) -> bool:
        with available():
            async with self._engine.begin() as connection:
                return bool((await connection.execute(statement)).rowcount)


def _one(org_id: str, kind: Kind, id_: str) -> tuple[Any, ...]:
    return stored.c.org_id == org_id, stored.c.kind == kind, stored.c.id == id_


def _filtered(org_id: str, wanted: Wanted) -> Select[Any]:
    conditions = [stored.c.org_id == org_id, stored.c.kind == wanted.kind, stored.c.expires_at > func.now()]
    if wanted.model is not None:
        conditions.append(stored.c.model == wanted.model)
    if wanted.user_id is not None:
        conditions.append(stored.c.user_id == wanted.user_id)
    if wanted.metadata:
        conditions.append(stored.c.metadata.contains(dict(wanted.metadata)))
    places = (stored.c.created_at, stored.c.id)
    ordered = places if wanted.order == "asc" else tuple(p.desc() for p in places)
    return select(*_SHOWN).where(*conditions).order_by(*ordered)


def _beyond(at: Any, wanted: Wanted) -> Any:
    """The entries after one, in the order of the list."""
    if wanted.order == "asc":
        return or_(stored.c.created_at > at, and_(stored.c.created_at == at, stored.c.id > wanted.after))
    return or_(stored.c.created_at < at, and_(stored.c.created_at == at, stored.c.id < wanted.after))


def _stored(row: RowMapping) -> Stored:
    return Stored(**dict(row))
