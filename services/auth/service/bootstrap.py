"""The first user and key of an installation, made from the command line by who holds its secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import OPERATORS, Account, Actor, AuditEntry, Origin
from services.auth.domain.organizations import OrgRole
from services.auth.errors import UserNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.keys import KeyRepository
from services.auth.repository.sessions import SessionRepository
from services.auth.service.accounts import Accounts
from services.auth.service.admin import Admin
from services.auth.service.keys import KeyDraft, Keys
from services.auth.service.outbox import Outbox
from shared.clock import Clock
from shared.database import AsyncSession
from shared.identity import Identity

ORIGIN = Origin(user_agent="tollgate bootstrap")


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    user_id: UUID
    org_id: UUID
    key_id: UUID
    key: str = field(repr=False)


class Bootstrap:
    """Idempotent: a user that is there stays as it is (password included), gains the role, and gets a fresh key."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        accounts: Accounts,
        keys: Keys,
        admin: Admin,
        outbox: Outbox,
        clock: Clock,
    ) -> None:
        self._sessions = sessions
        self._accounts = accounts
        self._keys = keys
        self._admin = admin
        self._outbox = outbox
        self._clock = clock

    async def run(
        self,
        *,
        username: str,
        email: str,
        password: str,
        role: str,
        key_name: str,
        scopes: Sequence[str],
        limits: Mapping[str, int] = MappingProxyType({}),
    ) -> Bootstrapped:
        """The user, the role, and a new key; an earlier key of that name is revoked. `limits` are the key's own, also
        above its plan's.

        Raises what registration and key creation raise.
        """
        account = await self._find_or_register(username, email, password)
        await self._ensure_role(account, role)
        # Whoever runs this holds the database's secrets; the key may have any scope and limit.
        identity = Identity(
            "user", user_id=str(account.user_id), org_id=str(account.org_id), scopes=("*",), roles=OPERATORS
        )
        actor = Actor(identity, ORIGIN, OrgRole.OWNER)
        await self._keys.revoke_named(actor, key_name)
        new = await self._keys.create(actor, KeyDraft(name=key_name, scopes=tuple(scopes)))
        if limits:
            await self._admin.set_key_limits(actor, new.record.id, limits)
        return Bootstrapped(account.user_id, account.org_id, new.record.id, new.secret)

    async def _find_or_register(self, username: str, email: str, password: str) -> Account:
        async with self._sessions() as session:
            found = await AccountRepository(session).find_by_login(username)
        return found or await self._accounts.register(username=username, email=email, password=password, origin=ORIGIN)

    async def _ensure_role(self, account: Account, role: str) -> None:
        if role in account.roles:
            return
        async with self._sessions.begin() as session:
            accounts = AccountRepository(session)
            if await accounts.lock_user(account.user_id) is None:
                raise UserNotFound()
            await accounts.grant_role(account.user_id, role)
            now = self._clock.now()
            keys = await KeyRepository(session, tenant=None).owner_changed(account.user_id)
            signed_in = await SessionRepository(session).owner_changed(account.user_id, now)
            entry = AuditEntry(
                action="user.role_granted",
                target_type="user",
                target_id=account.user_id,
                actor_user_id=None,
                actor_key_id=None,
                org_id=account.org_id,
                origin=ORIGIN,
                details={"before": sorted(account.roles), "after": sorted((*account.roles, role))},
            )
            await audit.append(session, entry, now)
        await self._outbox.deliver([*keys, *signed_in])
