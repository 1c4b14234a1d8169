"""Organisations, their members and invitations."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.auth.domain.organizations import Invitation, Member, Organization, OrgRole
from services.auth.errors import (
    InvalidInvitation,
    InvitationNotFound,
    LastOwner,
    MemberNotFound,
    NotAllowedInOrganization,
    OrganizationNotFound,
    OrganizationsByOperators,
    TooManyInvitations,
    TooManyMembers,
    TooManyOrganizations,
)
from services.auth.routes.dependencies import AllServices, CurrentActor
from services.auth.routes.fields import Body, KeyName, RefreshToken, refusals
from shared.errors import InvalidRequest, Unauthenticated

router = APIRouter(prefix="/api/v1/organizations", tags=["organizations"])

INVITATION_TTL_S_MIN, INVITATION_TTL_S_MAX = 60, 30 * 86_400


class OrganizationBody(Body):
    name: KeyName


class RoleBody(Body):
    role: OrgRole


class InvitationBody(Body):
    role: OrgRole = OrgRole.MEMBER
    expires_in: int | None = Field(
        None, ge=INVITATION_TTL_S_MIN, le=INVITATION_TTL_S_MAX, description="Seconds; by default a week."
    )


class JoinBody(Body):
    token: RefreshToken


class OrganizationAnswer(BaseModel):
    """`role` is the caller's: owner, admin or member."""

    object: Literal["organization"] = "organization"
    id: UUID
    name: str
    plan: str
    personal: bool
    role: OrgRole
    created_at: datetime


class MemberAnswer(BaseModel):
    object: Literal["member"] = "member"
    user_id: UUID
    username: str
    role: OrgRole
    created_at: datetime


class InvitationAnswer(BaseModel):
    object: Literal["invitation"] = "invitation"
    id: UUID
    role: OrgRole
    invited_by: UUID
    created_at: datetime
    expires_at: datetime


class NewInvitationAnswer(InvitationAnswer):
    """The only answer that ever shows `token`."""

    token: str


class OrganizationListAnswer(BaseModel):
    """All of them, as in the lists below: how many there can be is bounded."""

    object: Literal["list"] = "list"
    data: list[OrganizationAnswer]
    has_more: bool = False
    next_cursor: str | None = None


class MemberListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[MemberAnswer]
    has_more: bool = False
    next_cursor: str | None = None


class InvitationListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[InvitationAnswer]
    has_more: bool = False
    next_cursor: str | None = None


@router.get("", summary="List my organisations", responses=refusals(Unauthenticated))
async def list_organizations(actor: CurrentActor, services: AllServices) -> OrganizationListAnswer:
    """The caller's own, the one that access tokens name first."""
    return OrganizationListAnswer(data=[_organization(o) for o in await services.organizations.mine(actor)])


@router.post(
    "",
    status_code=201,
    summary="Make an organisation",
    responses=refusals(InvalidRequest, Unauthenticated, OrganizationsByOperators, TooManyOrganizations),
)
async def create_organization(body: OrganizationBody, actor: CurrentActor, services: AllServices) -> OrganizationAnswer:
    """The caller owns it."""
    return _organization(await services.organizations.create(actor, body.name))


@router.post(
    "/join",
    summary="Accept an invitation",
    responses=refusals(InvalidRequest, Unauthenticated, InvalidInvitation, TooManyMembers, TooManyOrganizations),
)
async def join(body: JoinBody, actor: CurrentActor, services: AllServices) -> OrganizationAnswer:
    """The token works once. Who is a member already stays what they are."""
    return _organization(await services.organizations.join(actor, body.token))


@router.get("/{org_id}", summary="Read an organisation", responses=refusals(Unauthenticated, OrganizationNotFound))
async def get_organization(org_id: UUID, actor: CurrentActor, services: AllServices) -> OrganizationAnswer:
    """As one of its members."""
    return _organization(await services.organizations.get(actor, org_id))


@router.patch(
    "/{org_id}",
    summary="Rename an organisation",
    responses=refusals(InvalidRequest, Unauthenticated, NotAllowedInOrganization, OrganizationNotFound),
)
async def update_organization(
    org_id: UUID, body: OrganizationBody, actor: CurrentActor, services: AllServices
) -> OrganizationAnswer:
    """For its owners and admins."""
    return _organization(await services.organizations.rename(actor, org_id, body.name))


@router.get("/{org_id}/members", summary="List members", responses=refusals(Unauthenticated, OrganizationNotFound))
async def list_members(org_id: UUID, actor: CurrentActor, services: AllServices) -> MemberListAnswer:
    """The first one first."""
    return MemberListAnswer(data=[_member(m) for m in await services.organizations.members(actor, org_id)])


@router.patch(
    "/{org_id}/members/{user_id}",
    summary="Change a member's role",
    responses=refusals(
        InvalidRequest, Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, MemberNotFound, LastOwner
    ),
)
async def set_role(
    org_id: UUID, user_id: UUID, body: RoleBody, actor: CurrentActor, services: AllServices
) -> MemberAnswer:
    """Owners make and unmake owners; admins the rest."""
    return _member(await services.organizations.set_role(actor, org_id, user_id, body.role))


@router.delete(
    "/{org_id}/members/{user_id}",
    status_code=204,
    summary="Remove a member, or leave",
    responses=refusals(Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, MemberNotFound, LastOwner),
)
async def remove_member(org_id: UUID, user_id: UUID, actor: CurrentActor, services: AllServices) -> None:
    """Their keys of this organisation are revoked."""
    await services.organizations.remove_member(actor, org_id, user_id)


@router.post(
    "/{org_id}/invitations",
    status_code=201,
    summary="Invite somebody",
    responses=refusals(
        InvalidRequest, Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, TooManyInvitations
    ),
)
async def invite(org_id: UUID, body: InvitationBody, actor: CurrentActor, services: AllServices) -> NewInvitationAnswer:
    """`token` is shown this once; whoever has it joins with it, once."""
    new = await services.organizations.invite(actor, org_id, body.role, body.expires_in)
    return NewInvitationAnswer(**_invitation(new.record).model_dump(), token=new.token)


@router.get(
    "/{org_id}/invitations",
    summary="List open invitations",
    responses=refusals(Unauthenticated, NotAllowedInOrganization, OrganizationNotFound),
)
async def list_invitations(org_id: UUID, actor: CurrentActor, services: AllServices) -> InvitationListAnswer:
    """Newest first, without their tokens."""
    found = await services.organizations.invitations(actor, org_id)
    return InvitationListAnswer(data=[_invitation(i) for i in found])


@router.delete(
    "/{org_id}/invitations/{invitation_id}",
    status_code=204,
    summary="Withdraw an invitation",
    responses=refusals(Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, InvitationNotFound),
)
async def withdraw_invitation(org_id: UUID, invitation_id: UUID, actor: CurrentActor, services: AllServices) -> None:
    """Its token stops at once."""
    await services.organizations.withdraw(actor, org_id, invitation_id)


def _organization(found: Organization) -> OrganizationAnswer:
    return OrganizationAnswer.model_validate(found, from_attributes=True)


def _member(found: Member) -> MemberAnswer:
    return MemberAnswer.model_validate(found, from_attributes=True)


def _invitation(found: Invitation) -> InvitationAnswer:
    return InvitationAnswer.model_validate(found, from_attributes=True)
