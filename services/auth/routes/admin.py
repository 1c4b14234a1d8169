"""For operators: other people's keys and accounts, and the audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from services.auth.domain import AuditFilter, AuditLine, UserStatus
from services.auth.errors import KeyNotActive, KeyNotFound, OrganizationNotFound, UserNotFound
from services.auth.routes.dependencies import AllServices, CurrentActor
from services.auth.routes.fields import Body, LimitsBody, Login, Timestamp, refusals
from services.auth.routes.keys import KeyAnswer, RevokedAnswer, key_answer
from services.auth.routes.pages import Before, PageSize, cursor_of
from shared.errors import InvalidRequest, PermissionDenied, Unauthenticated

router = APIRouter(prefix="/api/v1/admin/auth", tags=["admin"])

ACTION = r"^[a-z_]{1,40}\.[a-z_]{1,40}$"


# Bounds that every calculation with a time stands, in Python and in PostgreSQL.
LogTime = Annotated[Timestamp, Field(ge=datetime(1970, 1, 2, tzinfo=UTC), lt=datetime(2200, 1, 1, tzinfo=UTC))]


class SetLimitsBody(Body):
    """`limits: null` gives all of the plan's back."""

    limits: LimitsBody | None


class UserStatusBody(Body):
    status: UserStatus


class UserStatusAnswer(BaseModel):
    user_id: UUID
    status: UserStatus


class UserListEntry(BaseModel):
    """`kind` is `person` or `service`; a service account has a name and no address."""

    object: Literal["user"] = "user"
    id: UUID
    name: str
    kind: str
    email: str | None
    status: UserStatus
    roles: list[str]
    created_at: datetime


class UserListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[UserListEntry]
    has_more: bool
    next_cursor: str | None


class AuditLineAnswer(BaseModel):
    """What was done, by whom, to what, from where. `details` has `before` and `after` where something changed."""

    object: Literal["audit_line"] = "audit_line"
    id: UUID
    at: datetime
    action: str
    actor_user_id: UUID | None
    actor_key_id: UUID | None
    org_id: UUID | None
    target_type: str
    target_id: UUID | None
    request_id: str
    address: str | None
    details: dict[str, Any]


class AuditListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[AuditLineAnswer]
    has_more: bool
    next_cursor: str | None


class AuditQuery(Body):
    """Which lines: all that are given must hold."""

    actor: UUID | None = Field(None, description="The user who acted.")
    org: UUID | None = Field(None, description="The organisation it happened in.")
    action: str | None = Field(None, pattern=ACTION, description="As in `key.revoked`.")
    since: LogTime | None = Field(None, description="From this time on; with an offset.")
    until: LogTime | None = Field(None, description="Before this time; with an offset.")


@router.get(
    "/audit", summary="Read the audit log", responses=refusals(InvalidRequest, Unauthenticated, PermissionDenied)
)
async def read_audit(
    wanted: Annotated[AuditQuery, Depends()],
    actor: CurrentActor,
    services: AllServices,
    before: Before,
    limit: PageSize = 50,
) -> AuditListAnswer:
    """Every organisation's, newest first."""
    chosen = AuditFilter(wanted.actor, wanted.org, wanted.action, wanted.since, wanted.until)
    page = await services.admin.audit_page(actor, chosen, before=before, limit=limit)
    return AuditListAnswer(
        data=[_audit_line(line) for line in page.rows],
        has_more=page.next_id is not None,
        next_cursor=cursor_of(page.next_id),
    )


@router.get(
    "/users", summary="List or find users", responses=refusals(InvalidRequest, Unauthenticated, PermissionDenied)
)
async def list_users(
    actor: CurrentActor,
    services: AllServices,
    before: Before,
    limit: PageSize = 50,
    search: Annotated[
        Login | None, Query(description="How the user name begins; with an `@`, how the address does.")
    ] = None,
) -> UserListAnswer:
    """Everybody, newest first; those that are searched for, by name or address."""
    page = await services.admin.users(actor, search=search or "", before=before, limit=limit)
    return UserListAnswer(
        data=[
            UserListEntry(
                id=user.id,
                name=user.name,
                kind=user.kind,
                email=user.email or None,
                status=user.status,
                roles=list(user.roles),
                created_at=user.created_at,
            )
            for user in page.rows
        ],
        has_more=page.next_id is not None,
        next_cursor=cursor_of(page.next_id),
    )


@router.post(
    "/keys/{key_id}/limits",
    summary="Set a key's limits, above its plan's if need be",
    responses=refusals(InvalidRequest, Unauthenticated, PermissionDenied, KeyNotFound, KeyNotActive),
)
async def set_key_limits(key_id: UUID, body: SetLimitsBody, actor: CurrentActor, services: AllServices) -> KeyAnswer:
    """In force on the key's next request."""
    limits = body.limits.given() if body.limits else None
    return key_answer(await services.admin.set_key_limits(actor, key_id, limits), services.clock.now())


@router.post(
    "/keys/{key_id}/revoke",
    summary="Revoke any key",
    responses=refusals(Unauthenticated, PermissionDenied, KeyNotFound),
)
async def revoke_key(key_id: UUID, actor: CurrentActor, services: AllServices) -> KeyAnswer:
    """As its owner would."""
    return key_answer(await services.admin.revoke_key(actor, key_id), services.clock.now())


@router.post(
    "/users/{user_id}/keys/revoke",
    summary="Revoke a user's keys",
    responses=refusals(Unauthenticated, PermissionDenied, UserNotFound),
)
async def revoke_users_keys(user_id: UUID, actor: CurrentActor, services: AllServices) -> RevokedAnswer:
    """In every organisation."""
    return RevokedAnswer(revoked=await services.revocations.of_user(actor, user_id))


@router.post(
    "/organizations/{org_id}/keys/revoke",
    summary="Revoke an organisation's keys",
    responses=refusals(Unauthenticated, PermissionDenied, OrganizationNotFound),
)
async def revoke_organizations_keys(org_id: UUID, actor: CurrentActor, services: AllServices) -> RevokedAnswer:
    """Every member's."""
    return RevokedAnswer(revoked=await services.revocations.of_organization(actor, org_id))


@router.post(
    "/users/{user_id}/status",
    summary="Disable or enable a user",
    responses=refusals(InvalidRequest, Unauthenticated, PermissionDenied, UserNotFound),
)
async def set_user_status(
    user_id: UUID, body: UserStatusBody, actor: CurrentActor, services: AllServices
) -> UserStatusAnswer:
    """A disabled user's sessions end and their keys stop; enabled again, the keys work again."""
    return UserStatusAnswer(user_id=user_id, status=await services.admin.set_user_status(actor, user_id, body.status))


def _audit_line(line: AuditLine) -> AuditLineAnswer:
    entry = line.entry
    return AuditLineAnswer(
        id=line.id,
        at=line.at,
        action=entry.action,
        actor_user_id=entry.actor_user_id,
        actor_key_id=entry.actor_key_id,
        org_id=entry.org_id,
        target_type=entry.target_type,
        target_id=entry.target_id,
        request_id=entry.origin.request_id,
        address=entry.origin.address,
        details=dict(entry.details),
    )
