"""The API keys of an organisation: the one that token or key names, or another of the caller's, `organization_id`.

Members see and change their own keys; owners and admins, everybody's.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from services.auth.domain import DEFAULT_KEY_SCOPES, KEY_LIFETIME_DAYS_MAX, ApiKey
from services.auth.errors import (
    BeyondOwnKey,
    KeyNotActive,
    KeyNotFound,
    LimitAbovePlan,
    MemberNotFound,
    ModelNotHeld,
    NotAllowedInOrganization,
    NotKeyOwner,
    ScopeNotHeld,
    ServiceAccountNotFound,
    TooManyKeys,
)
from services.auth.routes.dependencies import ActorInOrganization, AllServices, From
from services.auth.routes.fields import (
    Body,
    KeyName,
    LeakedKey,
    LimitsAnswer,
    LimitsBody,
    Models,
    Networks,
    Scopes,
    Timestamp,
    refusals,
)
from services.auth.routes.pages import Before, PageSize, cursor_of
from services.auth.service.keys import KeyChange, KeyDraft, NewKey
from shared.errors import InvalidRequest, Unauthenticated

router = APIRouter(prefix="/api/v1/keys", tags=["keys"])

GRACE_S_DEFAULT = 86_400
GRACE_S_MAX = 30 * 86_400
USAGE_DAYS_MAX = 366


class CreateKeyBody(Body):
    model_config = ConfigDict(json_schema_extra={"example": {"name": "production", "limits": {"minute": 30}}})

    name: KeyName
    scopes: Scopes = Field(default_factory=lambda: list(DEFAULT_KEY_SCOPES))
    models: Models | None = Field(None, description="The models it may use; null for all.")
    limits: LimitsBody | None = None
    expires_at: Timestamp | None = Field(None, description="With an offset; null for never.")
    allowed_addresses: Networks | None = Field(None, description="Networks it may be used from (CIDR); null for any.")
    service_account_id: UUID | None = Field(None, description="A service account of the organisation, as its owner.")


class UpdateKeyBody(Body):
    """What is left out stays. `models: null` means all models, `limits: null` the plan's limits,
    `allowed_addresses: null` any address.
    """

    model_config = ConfigDict(json_schema_extra={"example": {"name": "staging", "limits": {"minute": 10}}})

    name: KeyName = ""
    scopes: Scopes = Field(default_factory=list)
    models: Models | None = None
    limits: LimitsBody | None = None
    allowed_addresses: Networks | None = None


class RotateKeyBody(Body):
    grace_s: int = Field(GRACE_S_DEFAULT, ge=0, le=GRACE_S_MAX, description="Seconds that the old key still works.")


class RevokeKeysBody(Body):
    user_id: UUID | None = Field(None, description="One member's keys; null for the whole organisation's.")


class LeakedKeyBody(Body):
    key: LeakedKey


class RevokedAnswer(BaseModel):
    """How many keys were active until now."""

    revoked: int


class KeyAnswer(BaseModel):
    """A key without its secret. `prefix` is what may be shown of it; `status` is active, expired or revoked."""

    object: Literal["api_key"] = "api_key"
    id: UUID
    name: str
    prefix: str
    status: str
    scopes: list[str]
    models: list[str] | None
    limits: LimitsAnswer
    allowed_addresses: list[str] | None
    user_id: UUID
    expires_at: datetime | None
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewKeyAnswer(KeyAnswer):
    """The only answer that ever shows `key`."""

    key: str


class DailyUseAnswer(BaseModel):
    """Admitted requests of a day (UTC), those among them answered 4xx and 5xx, bytes of their bodies."""

    day: date
    requests: int
    client_errors: int
    server_errors: int
    bytes_in: int
    bytes_out: int


class KeyUsageAnswer(BaseModel):
    """Days without use are left out; the latest first."""

    object: Literal["list"] = "list"
    data: list[DailyUseAnswer]
    has_more: bool = False
    next_cursor: str | None = None


class KeyListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyAnswer]
    has_more: bool
    next_cursor: str | None


@router.post(
    "",
    status_code=201,
    summary="Create a key",
    responses=refusals(
        InvalidRequest,
        Unauthenticated,
        ScopeNotHeld,
        ModelNotHeld,
        BeyondOwnKey,
        LimitAbovePlan,
        NotAllowedInOrganization,
        ServiceAccountNotFound,
        TooManyKeys,
    ),
)
async def create_key(body: CreateKeyBody, actor: ActorInOrganization, services: AllServices) -> NewKeyAnswer:
    """`key` is shown this once. It can do no more than who makes it; its limits are at most the plan's. One that a key
    makes has that key's limits, addresses and expiry where the body leaves them out.
    """
    draft = KeyDraft(
        name=body.name,
        scopes=tuple(body.scopes),
        models=None if body.models is None else tuple(body.models),
        limits=body.limits.given() if body.limits else {},
        expires_at=_future(body.expires_at, services.clock.now()),
        allowed_addresses=_networks(body.allowed_addresses),
        service_account_id=body.service_account_id,
    )
    return _new_key(await services.keys.create(actor, draft), services.clock.now())


@router.get("", summary="List keys", responses=refusals(InvalidRequest, Unauthenticated))
async def list_keys(
    actor: ActorInOrganization, services: AllServices, before: Before, limit: PageSize = 20
) -> KeyListAnswer:
    """The organisation's keys (a member's own), revoked ones too, newest first."""
    page = await services.keys.page(actor, before=before, limit=limit)
    now = services.clock.now()
    return KeyListAnswer(
        data=[key_answer(key, now) for key in page.rows],
        has_more=page.next_id is not None,
        next_cursor=cursor_of(page.next_id),
    )


@router.post(
    "/revoke",
    summary="Revoke many keys",
    responses=refusals(InvalidRequest, Unauthenticated, NotAllowedInOrganization, MemberNotFound),
)
async def revoke_keys(
    actor: ActorInOrganization, services: AllServices, body: RevokeKeysBody | None = None
) -> RevokedAnswer:
    """All keys of the organisation, or of one member: for its owners and admins; members, their own."""
    return RevokedAnswer(revoked=await services.revocations.in_organization(actor, body.user_id if body else None))


@router.post("/leaked", status_code=204, summary="Report a leaked key", responses=refusals(InvalidRequest))
async def report_leaked_key(body: LeakedKeyBody, services: AllServices, origin: From) -> None:
    """Public: whoever has a secret may have it revoked. The answer is the same for every string."""
    await services.revocations.leaked(body.key, origin)


@router.get("/{key_id}", summary="Read a key", responses=refusals(Unauthenticated, KeyNotFound))
async def get_key(key_id: UUID, actor: ActorInOrganization, services: AllServices) -> KeyAnswer:
    """Everything but the secret, which nobody has."""
    return key_answer(await services.keys.get(actor, key_id), services.clock.now())


@router.get(
    "/{key_id}/usage",
    summary="How a key is used",
    responses=refusals(InvalidRequest, Unauthenticated, KeyNotFound),
)
async def get_key_usage(
    key_id: UUID,
    actor: ActorInOrganization,
    services: AllServices,
    days: Annotated[int, Query(ge=1, le=USAGE_DAYS_MAX, description="Today and the days before it.")] = 30,
) -> KeyUsageAnswer:
    """By day, some seconds behind. What it cost is billing's to say."""
    uses = await services.key_usage.of_key(actor, key_id, days=days)
    return KeyUsageAnswer(data=[DailyUseAnswer.model_validate(use, from_attributes=True) for use in uses])


@router.patch(
    "/{key_id}",
    summary="Change a key",
    responses=refusals(
        InvalidRequest,
        Unauthenticated,
        ScopeNotHeld,
        ModelNotHeld,
        BeyondOwnKey,
        LimitAbovePlan,
        KeyNotFound,
        KeyNotActive,
    ),
)
async def update_key(key_id: UUID, body: UpdateKeyBody, actor: ActorInOrganization, services: AllServices) -> KeyAnswer:
    """Name, scopes, models, limits or addresses; in force on the key's next request."""
    change = KeyChange(
        given=frozenset(body.model_fields_set),
        name=body.name,
        scopes=tuple(body.scopes),
        models=None if body.models is None else tuple(body.models),
        limits=body.limits.given() if body.limits else None,
        allowed_addresses=_networks(body.allowed_addresses),
    )
    return key_answer(await services.keys.update(actor, key_id, change), services.clock.now())


@router.post("/{key_id}/revoke", summary="Revoke a key", responses=refusals(Unauthenticated, KeyNotFound))
async def revoke_key(key_id: UUID, actor: ActorInOrganization, services: AllServices) -> KeyAnswer:
    """For good, from the key's next request on. Revoking a revoked key changes nothing."""
    return key_answer(await services.keys.revoke(actor, key_id), services.clock.now())


@router.delete("/{key_id}", status_code=204, summary="Revoke a key", responses=refusals(Unauthenticated, KeyNotFound))
async def delete_key(key_id: UUID, actor: ActorInOrganization, services: AllServices) -> None:
    """The same as `POST …/revoke`; the record stays for the audit."""
    await services.keys.revoke(actor, key_id)


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    summary="Replace a key's secret",
    responses=refusals(
        InvalidRequest,
        Unauthenticated,
        NotKeyOwner,
        ScopeNotHeld,
        ModelNotHeld,
        BeyondOwnKey,
        KeyNotFound,
        KeyNotActive,
        TooManyKeys,
    ),
)
async def rotate_key(
    key_id: UUID, actor: ActorInOrganization, services: AllServices, body: RotateKeyBody | None = None
) -> NewKeyAnswer:
    """A new key on the same terms. The old one works for `grace_s` more; both draw on the same limits."""
    grace_s = body.grace_s if body else GRACE_S_DEFAULT
    return _new_key(await services.keys.rotate(actor, key_id, grace_s=grace_s), services.clock.now())


def key_answer(key: ApiKey, now: datetime) -> KeyAnswer:
    return KeyAnswer(
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        status=key.state_at(now),
        scopes=list(key.scopes),
        models=None if key.models is None else list(key.models),
        limits=LimitsAnswer.model_validate(key.limits, from_attributes=True),
        allowed_addresses=None if key.allowed_addresses is None else list(key.allowed_addresses),
        user_id=key.user_id,
        expires_at=key.expires_at,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
    )


def _new_key(new: NewKey, now: datetime) -> NewKeyAnswer:
    return NewKeyAnswer(**key_answer(new.record, now).model_dump(), key=new.secret)


def _networks(given: list[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(dict.fromkeys(given))


def _future(expires_at: datetime | None, now: datetime) -> datetime | None:
    if expires_at is not None and not now < expires_at <= now + timedelta(days=KEY_LIFETIME_DAYS_MAX):
        raise InvalidRequest(
            f"expires_at: give a time in the future, at most {KEY_LIFETIME_DAYS_MAX} days ahead.", param="expires_at"
        )
    return expires_at
