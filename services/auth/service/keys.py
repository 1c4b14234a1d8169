"""API keys: create, list, change, rotate, revoke.

Every change is committed with its outbox row, then told to Redis before the caller hears of it, so that a revoked key
fails on its next request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import (
    Actor,
    ApiKey,
    KeyEvent,
    KeyStatus,
    Page,
    audit_entry,
    check_models,
    check_scopes,
    merge_limits,
    page_of,
    reach,
)
from services.auth.domain.organizations import OrgRole, check_may_manage
from services.auth.errors import (
    KeyNotActive,
    NotAllowedInOrganization,
    NotKeyOwner,
    ServiceAccountNotFound,
    TooManyKeys,
)
from services.auth.repository import audit
from services.auth.repository.keys import KeyRepository
from services.auth.repository.service_accounts import ServiceAccountRepository
from services.auth.service.outbox import Outbox
from shared import apikeys, ids
from shared.apikeys import Peppers
from shared.clock import Clock
from shared.database import AsyncSession
from shared.telemetry import AuthMetrics


@dataclass(frozen=True, slots=True)
class KeyDraft:
    """What a new key should be. `models` None means all; `limits` are its own, below the plan's; `service_account_id`
    is whose it is, in place of the actor's.
    """

    name: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None = None
    limits: Mapping[str, int | None] = field(default_factory=dict)
    expires_at: datetime | None = None
    allowed_addresses: tuple[str, ...] | None = None
    service_account_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A patch: only the fields named in `given` count, since null means something in some of them."""

    given: frozenset[str]
    name: str = ""
    scopes: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    limits: Mapping[str, int | None] | None = None
    allowed_addresses: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key and, this once, its secret, which `repr` does not show."""

    record: ApiKey
    secret: str = field(repr=False)


class Keys:
    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        peppers: Peppers,
        outbox: Outbox,
        clock: Clock,
        metrics: AuthMetrics,
        *,
        per_org_max: int,
    ) -> None:
        self._sessions = sessions
        self._peppers = peppers
        self._outbox = outbox
        self._clock = clock
        self._metrics = metrics
        self._per_org_max = per_org_max

    async def create(self, actor: Actor, draft: KeyDraft) -> NewKey:
        """A new key of the actor's organisation.

        Raises ScopeNotHeld, ModelNotHeld, BeyondOwnKey, LimitAbovePlan, InvalidRequest, TooManyKeys; for a service
        account's also NotAllowedInOrganization, ServiceAccountNotFound.
        """
        actor.identity.require_scope("keys:write")
        scopes = check_scopes(draft.scopes, actor.identity.scopes)
        models = check_models(draft.models, actor.identity.models)
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = _repository(session, actor)
            owner_id = await self._owner(session, actor, draft.service_account_id)
            plan = await self._make_room(repository, actor.org_id, now)
            key_id = ids.uuid7()
            record = ApiKey(
                id=key_id,
                org_id=actor.org_id,
                user_id=owner_id,
                name=draft.name,
                prefix="",
                scopes=scopes,
                models=models,
                overrides=merge_limits({}, draft.limits, plan),
                plan_limits=plan,
                limit_id=key_id,
                version=1,
                status=KeyStatus.ACTIVE,
                expires_at=draft.expires_at,
                created_at=now,
                revoked_at=None,
                last_used_at=None,
                allowed_addresses=draft.allowed_addresses,
            )
            maker = await self._maker(session, actor)
            new = self._generate(reach.within(record, maker, draft.limits) if maker else record)
            await repository.add(new.record, self._peppers.digest(new.secret))
            entry = audit_entry(actor, "key.created", "api_key", key_id, actor.org_id, after=_terms(new.record))
            await audit.append(session, entry, now)
        self._metrics.keys.labels("created").inc()
        return new

    async def page(self, actor: Actor, *, before: UUID | None, limit: int) -> Page[ApiKey]:
        """The organisation's keys, newest first."""
        actor.identity.require_scope("keys:read")
        async with self._sessions() as session:
            keys = await _repository(session, actor).page(before=before, limit=limit + 1)
        return page_of(keys, limit, lambda key: key.id)

    async def get(self, actor: Actor, key_id: UUID) -> ApiKey:
        """Raises KeyNotFound, also for another organisation's."""
        actor.identity.require_scope("keys:read")
        async with self._sessions() as session:
            return await _repository(session, actor).get(key_id)

    async def update(self, actor: Actor, key_id: UUID, change: KeyChange) -> ApiKey:
        """Change name, scopes, models, limits or the addresses it may be used from.

        Raises KeyNotFound, KeyNotActive, ScopeNotHeld, ModelNotHeld, BeyondOwnKey, LimitAbovePlan, InvalidRequest.
        """
        actor.identity.require_scope("keys:write")
        async with self._sessions.begin() as session:
            repository = _repository(session, actor)
            before = self._usable(await repository.lock(key_id))
            values: dict[str, object] = {}
            if "name" in change.given:
                values["name"] = change.name
            if "scopes" in change.given:
                values["scopes"] = list(check_scopes(change.scopes, actor.identity.scopes))
            if "models" in change.given:
                models = check_models(change.models, actor.identity.models)
                values["models"] = None if models is None else list(models)
            if "limits" in change.given:
                values["limits"] = merge_limits(before.overrides, change.limits, before.plan_limits)
            if "allowed_addresses" in change.given:
                networks = change.allowed_addresses
                values["allowed_addresses"] = None if networks is None else list(networks)
            maker = await self._maker(session, actor)  # as it was: it may be changing itself
            events = await repository.change(key_id, **values)
            after = await repository.get(key_id)
            if maker is not None:
                if "limits" in change.given:
                    reach.check_limits(after, maker)
                if "allowed_addresses" in change.given:
                    reach.check_addresses(after.allowed_addresses, maker.allowed_addresses)
            entry = audit_entry(
                actor, "key.updated", "api_key", key_id, after.org_id, before=_terms(before), after=_terms(after)
            )
            await audit.append(session, entry, self._clock.now())
        await self._outbox.deliver(events)
        return after

    async def revoke(self, actor: Actor, key_id: UUID) -> ApiKey:
        """Revoke a key, effective on its next request. A revoked one stays so: twice is fine. Raises KeyNotFound."""
        actor.identity.require_scope("keys:write")
        return await self.revoke_of(actor, key_id, tenant=actor.org_id, owner=actor.keys_of)

    async def revoke_of(self, actor: Actor, key_id: UUID, *, tenant: UUID | None, owner: UUID | None) -> ApiKey:
        """As `revoke`, for callers who have checked the right: `tenant` None reaches every organisation's keys."""
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = KeyRepository(session, tenant=tenant, owner=owner)
            key = await repository.lock(key_id)
            events = await repository.revoke([key_id], now)
            if events:
                before, after = key.state_at(now), KeyStatus.REVOKED.value
                entry = audit_entry(actor, "key.revoked", "api_key", key_id, key.org_id, before=before, after=after)
                await audit.append(session, entry, now)
                key = await repository.get(key_id)
        if events:
            self._metrics.keys.labels("revoked").inc()
        await self._outbox.deliver(events)
        return key

    async def rotate(self, actor: Actor, key_id: UUID, *, grace_s: int) -> NewKey:
        """A new secret on the same terms and the same limit counters; the old key works for `grace_s` more, never
        past its own expiry. Raises KeyNotFound, KeyNotActive, NotKeyOwner, ScopeNotHeld, ModelNotHeld, BeyondOwnKey,
        TooManyKeys.
        """
        actor.identity.require_scope("keys:write")
        now = self._clock.now()
        async with self._sessions.begin() as session:
            repository = _repository(session, actor)
            if grace_s:  # for so long there is one key more
                await self._make_room(repository, actor.org_id, now)
            old = self._usable(await repository.lock(key_id))
            if old.user_id != actor.user_id:
                await self._require_service_account(session, actor, old.user_id)
            check_scopes(old.scopes, actor.identity.scopes)
            check_models(old.models, actor.identity.models)
            if maker := await self._maker(session, actor):
                reach.check_within(old, maker)
            new = self._generate(_successor(old, now))
            await repository.add(new.record, self._peppers.digest(new.secret))
            events = await self._retire(repository, old, now, grace_s)
            entry = audit_entry(
                actor, "key.rotated", "api_key", key_id, old.org_id, successor=str(new.record.id), grace_s=grace_s
            )
            await audit.append(session, entry, now)
        self._metrics.keys.labels("rotated").inc()
        await self._outbox.deliver(events)
        return new

    async def revoke_named(self, actor: Actor, name: str) -> None:
        """Revoke the actor's own usable keys of a name."""
        async with self._sessions() as session:
            repository = _repository(session, actor)
            key_ids = await repository.usable_named(actor.user_id, name, self._clock.now())
        for key_id in key_ids:
            await self.revoke(actor, key_id)

    @staticmethod
    async def _maker(session: AsyncSession, actor: Actor) -> ApiKey | None:
        """The key that acts; None for a person."""
        if actor.key_id is None:
            return None
        return await KeyRepository(session, tenant=actor.org_id).get(actor.key_id)

    @staticmethod
    async def _owner(session: AsyncSession, actor: Actor, service_account_id: UUID | None) -> UUID:
        """Whose key it will be: the actor's own, or of a service account that they manage."""
        if service_account_id is None:
            return actor.user_id
        check_may_manage(actor.org_role, OrgRole.MEMBER)
        await ServiceAccountRepository(session, tenant=actor.org_id).lock(service_account_id)
        return service_account_id

    @staticmethod
    async def _require_service_account(session: AsyncSession, actor: Actor, owner_id: UUID) -> None:
        """Raise NotKeyOwner unless the owner is a service account, which its organisation's managers act for."""
        try:
            check_may_manage(actor.org_role, OrgRole.MEMBER)
            await ServiceAccountRepository(session, tenant=actor.org_id).lock(owner_id)
        except (ServiceAccountNotFound, NotAllowedInOrganization):
            raise NotKeyOwner() from None

    async def _make_room(self, repository: KeyRepository, org_id: UUID, now: datetime) -> dict[str, int]:
        """The plan's limits, once there is room for one key more; keys of an organisation are made one by one."""
        plan = await repository.plan_limits(org_id)
        if await repository.count_usable(now) >= self._per_org_max:
            raise TooManyKeys()
        return plan

    @staticmethod
    async def _retire(repository: KeyRepository, old: ApiKey, now: datetime, grace_s: int) -> list[KeyEvent]:
        if grace_s == 0:
            return await repository.revoke([old.id], now)
        end = now + timedelta(seconds=grace_s)
        return await repository.change(old.id, expires_at=min(end, old.expires_at) if old.expires_at else end)

    def _usable(self, key: ApiKey) -> ApiKey:
        if key.state_at(self._clock.now()) != "active":
            raise KeyNotActive()
        return key

    @staticmethod
    def _generate(record: ApiKey) -> NewKey:
        secret = apikeys.generate()
        return NewKey(replace(record, prefix=apikeys.display_prefix(secret)), secret)


def _repository(session: AsyncSession, actor: Actor) -> KeyRepository:
    """A member's own keys; to owners and admins, the whole organisation's."""
    return KeyRepository(session, tenant=actor.org_id, owner=actor.keys_of)


def _successor(old: ApiKey, now: datetime) -> ApiKey:
    return replace(old, id=ids.uuid7(), version=1, created_at=now, last_used_at=None)


def _terms(key: ApiKey) -> dict[str, object]:
    """What a key may do, for the audit log."""
    return {
        "name": key.name,
        "scopes": list(key.scopes),
        "models": None if key.models is None else list(key.models),
        "limits": dict(key.overrides),
        "allowed_addresses": None if key.allowed_addresses is None else list(key.allowed_addresses),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
    }
