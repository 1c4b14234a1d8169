"""People, organisations, sessions and keys: frozen records and the rules about them that need no database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Generic, Literal, TypeVar
from uuid import UUID

from services.auth.domain.organizations import OrgRole
from services.auth.errors import LimitAbovePlan, ModelNotHeld, ScopeNotHeld
from shared.errors import InvalidRequest
from shared.identity import Identity

Row = TypeVar("Row")

SCOPES = ("chat", "models", "inference", "billing:read", "billing:write", "keys:read", "keys:write", "admin", "*")
DEFAULT_KEY_SCOPES = ("chat", "models", "inference", "billing:read")
DEFAULT_PLAN = "default"
BASE_ROLE = "user"
OPERATORS = ("operator", "admin")

KEY_LIFETIME_DAYS_MAX = 3_650
USER_AGENT_CHARS_MAX = 256


class UserStatus(StrEnum):
    ACTIVE = "active"
    DISABLED = "disabled"


class RegistrationMode(StrEnum):
    """`open`: an account at once. `verified`: when the address is proven. `closed`: operators make accounts."""

    OPEN = "open"
    VERIFIED = "verified"
    CLOSED = "closed"


class KeyStatus(StrEnum):
    ACTIVE = "active"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from, for sessions and the audit log."""

    request_id: str = ""
    address: str | None = None
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: the gateway's identity, with roles and scopes as the database has them now, in one organisation."""

    identity: Identity
    origin: Origin
    org_role: OrgRole

    @property
    def user_id(self) -> UUID:
        return UUID(self.identity.user_id)

    @property
    def org_id(self) -> UUID:
        return UUID(self.identity.org_id)

    @property
    def key_id(self) -> UUID | None:
        return UUID(self.identity.key_id) if self.identity.key_id else None

    @property
    def keys_of(self) -> UUID | None:
        """Whose keys of the organisation the actor may touch: their own, or everybody's (None)."""
        return self.user_id if self.org_role is OrgRole.MEMBER else None

    @property
    def session_id(self) -> UUID | None:
        return UUID(self.identity.session_id) if self.identity.session_id else None


@dataclass(frozen=True, slots=True)
class Account:
    """A user in one organisation: what a token says, and what is needed to sign in."""

    user_id: UUID
    username: str
    email: str
    password_hash: str
    status: UserStatus
    created_at: datetime
    org_id: UUID
    org_name: str
    org_role: str
    plan: str
    roles: tuple[str, ...]
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UserSummary:
    """A user in a list: a person by their user name, a service account by its name."""

    id: UUID
    name: str
    kind: str
    email: str
    status: UserStatus
    roles: tuple[str, ...]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Session:
    """One sign-in: the family of refresh tokens that follow from it. `browser`: they are kept in cookies."""

    id: UUID
    user_id: UUID
    org_id: UUID
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    user_agent: str
    address: str | None
    version: int = 1
    browser: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Effective limits of a key. Requests per window, requests at once, tokens per minute (0: no token limit)."""

    minute: int
    hour: int
    day: int
    concurrency: int
    tokens_per_minute: int


LIMIT_NAMES = ("minute", "hour", "day", "concurrency", "tokens_per_minute")
# The gateway keeps one timestamp per request of the largest exact window: the hour's bound is memory.
LIMIT_MAX: Mapping[str, int] = {
    "minute": 100_000,
    "hour": 1_000_000,
    "day": 10_000_000,
    "concurrency": 10_000,
    "tokens_per_minute": 1_000_000_000,
}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret. `overrides` are its own limits; the plan's hold for the rest.

    `allowed_addresses` are the networks (CIDR) that it may be used from; None for any.
    """

    id: UUID
    org_id: UUID
    user_id: UUID
    name: str
    prefix: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    overrides: Mapping[str, int]
    plan_limits: Mapping[str, int]
    limit_id: UUID
    version: int
    status: KeyStatus
    expires_at: datetime | None
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None
    allowed_addresses: tuple[str, ...] | None = None

    @property
    def limits(self) -> Limits:
        return Limits(**{name: {**self.plan_limits, **self.overrides}[name] for name in LIMIT_NAMES})

    def state_at(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """The status as its owner sees it; expiry is judged at use, never by a job."""
        if self.status is KeyStatus.REVOKED:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"


@dataclass(frozen=True, slots=True)
class DailyUse:
    """What a key was used for on a day (UTC): admitted requests, those answered 4xx and 5xx, bytes of bodies."""

    day: date
    requests: int = 0
    client_errors: int = 0
    server_errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """A change of a key that every gateway must hear of: from `version` on, older records of it are wrong."""

    id: int
    key_id: UUID
    org_id: UUID
    digest: str
    version: int


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """A change of a session that every gateway must hear of: access tokens of earlier versions are over."""

    id: int
    session_id: UUID
    org_id: UUID
    version: int


Event = KeyEvent | SessionEvent


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """A page of a list, newest first; the next page begins after `next_id`, which is None on the last one."""

    rows: tuple[Row, ...]
    next_id: UUID | None


def page_of(rows: Sequence[Row], limit: int, id_of: Callable[[Row], UUID]) -> Page[Row]:
    """The page of `limit` rows, out of one more than that where there are more."""
    return Page(tuple(rows[:limit]), id_of(rows[limit - 1]) if len(rows) > limit else None)


@dataclass(frozen=True, slots=True)
class AttemptCount:
    """Failed sign-ins since a time; none is tried before `blocked_until`."""

    failures: int
    since: datetime
    blocked_until: datetime | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the audit log. `details` holds what changed, `{"before": …, "after": …}`; never a secret."""

    action: str
    target_type: str
    target_id: UUID | None
    actor_user_id: UUID | None
    actor_key_id: UUID | None
    org_id: UUID | None
    origin: Origin
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AuditLine:
    """An entry as it stands in the log."""

    id: UUID
    at: datetime
    entry: AuditEntry


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which lines to read: None means any; times from `since` on and before `until`."""

    actor_user_id: UUID | None = None
    org_id: UUID | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def audit_entry(
    actor: Actor, action: str, target_type: str, target_id: UUID, org_id: UUID, **details: object
) -> AuditEntry:
    """What an actor did to something."""
    return AuditEntry(action, target_type, target_id, actor.user_id, actor.key_id, org_id, actor.origin, details)


def covers(held: Iterable[str], scope: str) -> bool:
    """Whether held scopes include one: itself or `*`; only `*` includes `*`."""
    return any(s in (scope, "*") for s in held)


def check_scopes(scopes: Iterable[str], held: Iterable[str]) -> tuple[str, ...]:
    """The scopes without repetition. Raises InvalidRequest for an unknown one, ScopeNotHeld for a foreign one."""
    held = tuple(held)
    wanted = tuple(dict.fromkeys(scopes))
    for scope in wanted:
        if scope not in SCOPES:
            raise InvalidRequest(f"scopes: there is no such scope; known are {', '.join(SCOPES)}.", param="scopes")
        if not covers(held, scope):
            raise ScopeNotHeld(param="scopes")
    return wanted


def check_models(models: Iterable[str] | None, held: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The models a key may reach, None for all. Raises ModelNotHeld when its maker reaches fewer."""
    wanted = None if models is None else tuple(dict.fromkeys(models))
    if held is not None and (wanted is None or not set(wanted) <= set(held)):
        raise ModelNotHeld(param="models")
    return wanted


def merge_limits(
    present: Mapping[str, int],
    change: Mapping[str, int | None] | None,
    plan: Mapping[str, int],
    *,
    may_raise: bool = False,
) -> dict[str, int]:
    """A key's own limits after a merge patch (RFC 7396): null for one or all of them gives the plan's back.

    Without `may_raise`, a limit may be at most the plan's, or what an operator raised the key's to before; raises
    LimitAbovePlan else.
    """
    if change is None:
        return {}
    merged = dict(present)
    for name, value in change.items():
        if value is None:
            merged.pop(name, None)
            continue
        ceilings = (plan[name], present.get(name, plan[name]))
        if not may_raise and all(exceeds(name, value, ceiling) for ceiling in ceilings):
            raise LimitAbovePlan(f"limits.{name}: at most {max(ceilings)} here; ask an operator to raise it.")
        merged[name] = value
    return merged


def exceeds(name: str, value: int, ceiling: int) -> bool:
    """Whether a limit is above another."""
    if name == "tokens_per_minute" and 0 in (value, ceiling):  # 0 is "no limit", above every number
        return ceiling != 0
    return value > ceiling
