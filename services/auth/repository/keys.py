"""API keys and the outbox of their changes.

Two doors, and no other way in: `tenant` decides in one place whose keys are seen, and `_apply` makes every change of a
key grow its version and leave an event in the outbox, in the same statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Select, Update, func, insert, or_, select, update

from services.auth.domain import ApiKey, KeyEvent, KeyStatus
from services.auth.errors import KeyNotFound
from services.auth.tables import ApiKeyRow, KeyOutboxRow, OrganizationRow, PlanRow
from shared.apikeys import Digest
from shared.database import AsyncSession


class KeyRepository:
    """The keys of one organisation, or of all for an operator (`tenant=None`, said explicitly); with `owner`, only
    that member's.
    """

    def __init__(self, session: AsyncSession, *, tenant: UUID | None, owner: UUID | None = None) -> None:
        self._session = session
        self._of_tenant = (ApiKeyRow.org_id == tenant,) if tenant is not None else ()
        self._mine = (*self._of_tenant, *((ApiKeyRow.user_id == owner,) if owner is not None else ()))

    async def plan_limits(self, org_id: UUID) -> dict[str, int]:
        """The limits of an organisation's plan. Locks the organisation, so that keys are counted one by one."""
        statement = (
            select(PlanRow.limits)
            .join(OrganizationRow, OrganizationRow.plan == PlanRow.name)
            .where(OrganizationRow.id == org_id)
            .with_for_update(of=OrganizationRow, key_share=True)
        )
        return dict((await self._session.execute(statement)).scalar_one())

    async def add(self, key: ApiKey, digest: Digest) -> None:
        await self._session.execute(
            insert(ApiKeyRow).values(
                id=key.id,
                org_id=key.org_id,
                user_id=key.user_id,
                name=key.name,
                prefix=key.prefix,
                digest=digest.hex,
                pepper=digest.pepper,
                scopes=list(key.scopes),
                models=None if key.models is None else list(key.models),
                limits=dict(key.overrides),
                limit_id=key.limit_id,
                version=key.version,
                expires_at=key.expires_at,
                created_at=key.created_at,
                allowed_addresses=None if key.allowed_addresses is None else list(key.allowed_addresses),
            )
        )

    async def count_usable(self, now: datetime) -> int:
        """How many keys of the organisation are active and not expired, whoever's they are."""
        statement = select(func.count()).select_from(ApiKeyRow).where(*self._of_tenant, *_usable(now))
        return int((await self._session.execute(statement)).scalar_one())

    async def page(self, *, before: UUID | None, limit: int) -> list[ApiKey]:
        """Keys made before one, newest first: a UUIDv7 sorts by its time."""
        statement = self._keys().order_by(ApiKeyRow.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(ApiKeyRow.id < before)
        return [_key(row) for row in await self._session.execute(statement)]

    async def get(self, key_id: UUID) -> ApiKey:
        """Raises KeyNotFound."""
        return await self._one(self._keys().where(ApiKeyRow.id == key_id))

    async def lock(self, key_id: UUID) -> ApiKey:
        """As `get`, and nobody else changes it until the transaction ends."""
        return await self._one(self._keys().where(ApiKeyRow.id == key_id).with_for_update(of=ApiKeyRow))

    async def lock_by_digest(self, digests: Sequence[str]) -> ApiKey | None:
        """The key that is stored under one of the digests, locked; None where there is none."""
        statement = self._keys().where(ApiKeyRow.digest.in_(digests)).with_for_update(of=ApiKeyRow)
        row = (await self._session.execute(statement)).one_or_none()
        return _key(row) if row else None

    async def usable_named(self, user_id: UUID, name: str, now: datetime) -> list[UUID]:
        """The usable keys of a user that bear a name."""
        statement = select(ApiKeyRow.id).where(
            *self._mine, *_usable(now), ApiKeyRow.user_id == user_id, ApiKeyRow.name == name
        )
        return list(await self._session.scalars(statement))

    async def change(self, key_id: UUID, **values: object) -> list[KeyEvent]:
        """Set columns of a key. Raises KeyNotFound."""
        events = await self._apply(update(ApiKeyRow).where(*self._mine, ApiKeyRow.id == key_id).values(**values))
        if not events:
            raise KeyNotFound()
        return events

    async def revoke(self, key_ids: list[UUID], now: datetime) -> list[KeyEvent]:
        """Revoke those of the keys that are active; the events of those."""
        return await self._apply(
            update(ApiKeyRow)
            .where(*self._mine, ApiKeyRow.id.in_(key_ids), ApiKeyRow.status == KeyStatus.ACTIVE)
            .values(status=KeyStatus.REVOKED, revoked_at=now)
        )

    async def revoke_all(self, now: datetime) -> list[KeyEvent]:
        """Revoke every active key that this repository sees; the events of those."""
        assert self._mine, "neither organisation nor owner"
        return await self._apply(
            update(ApiKeyRow)
            .where(*self._mine, ApiKeyRow.status == KeyStatus.ACTIVE)
            .values(status=KeyStatus.REVOKED, revoked_at=now)
        )

    async def owner_changed(self, user_id: UUID) -> list[KeyEvent]:
        """The owner's roles, membership or status changed: gateways must read all their keys again."""
        return await self._apply(update(ApiKeyRow).where(*self._mine, ApiKeyRow.user_id == user_id))

    async def _apply(self, change: Update) -> list[KeyEvent]:
        changed = (
            change.values(version=ApiKeyRow.version + 1)
            .returning(ApiKeyRow.id, ApiKeyRow.org_id, ApiKeyRow.digest, ApiKeyRow.version)
            .cte("changed")
        )
        columns = ["key_id", "org_id", "digest", "version"]
        recorded = (
            insert(KeyOutboxRow)
            .from_select(columns, select(changed))
            .returning(
                KeyOutboxRow.id, KeyOutboxRow.key_id, KeyOutboxRow.org_id, KeyOutboxRow.digest, KeyOutboxRow.version
            )
        )
        return [KeyEvent(*row) for row in await self._session.execute(recorded)]

    def _keys(self) -> Select[ApiKeyRow, dict[str, Any]]:
        return (
            select(ApiKeyRow, PlanRow.limits)
            .join(OrganizationRow, OrganizationRow.id == ApiKeyRow.org_id)
            .join(PlanRow, PlanRow.name == OrganizationRow.plan)
            .where(*self._mine)
        )

    async def _one(self, statement: Select[ApiKeyRow, dict[str, Any]]) -> ApiKey:
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise KeyNotFound()
        return _key(row)


def _usable(now: datetime) -> tuple[Any, ...]:
    return (
        ApiKeyRow.status == KeyStatus.ACTIVE,
        or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now),
    )


def _key(row: Row[ApiKeyRow, dict[str, Any]]) -> ApiKey:
    key, plan_limits = row
    return ApiKey(
        id=key.id,
        org_id=key.org_id,
        user_id=key.user_id,
        name=key.name,
        prefix=key.prefix,
        scopes=tuple(key.scopes),
        models=None if key.models is None else tuple(key.models),
        overrides=dict(key.limits),
        plan_limits=dict(plan_limits),
        limit_id=key.limit_id,
        version=key.version,
        status=KeyStatus(key.status),
        expires_at=key.expires_at,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
        allowed_addresses=None if key.allowed_addresses is None else tuple(key.allowed_addresses),
    )
