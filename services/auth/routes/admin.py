"""For operators: other people's keys and accounts."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from services.auth.domain import UserStatus
from services.auth.errors import KeyNotActive, KeyNotFound, UserNotFound
from services.auth.routes.dependencies import AllServices, CurrentActor
from services.auth.routes.fields import Body, LimitsBody, refusals
from services.auth.routes.keys import KeyAnswer, key_answer
from shared.errors import InvalidRequest, PermissionDenied, Unauthenticated

router = APIRouter(prefix="/api/v1/admin/auth", tags=["admin"])


class SetLimitsBody(Body):
    """`limits: null` gives all of the plan's back."""

    limits: LimitsBody | None


class UserStatusBody(Body):
    status: UserStatus


class UserStatusAnswer(BaseModel):
    user_id: UUID
    status: UserStatus


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
    "/users/{user_id}/status",
    summary="Disable or enable a user",
    responses=refusals(InvalidRequest, Unauthenticated, PermissionDenied, UserNotFound),
)
async def set_user_status(
    user_id: UUID, body: UserStatusBody, actor: CurrentActor, services: AllServices
) -> UserStatusAnswer:
    """A disabled user's sessions end and their keys stop; enabled again, the keys work again."""
    return UserStatusAnswer(user_id=user_id, status=await services.admin.set_user_status(actor, user_id, body.status))
