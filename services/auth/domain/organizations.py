"""Organisations, their members and invitations."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from services.auth.errors import NotAllowedInOrganization


class OrgRole(StrEnum):
    """What a member is in an organisation; not to be confused with the roles on the installation."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"


@dataclass(frozen=True, slots=True)
class Organization:
    """An organisation as one of its members sees it: `role` is theirs."""

    id: UUID
    name: str
    plan: str
    personal: bool
    role: OrgRole
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Member:
    user_id: UUID
    username: str
    role: OrgRole
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """Who owns keys in a person's place: it stays when people leave, and never signs in."""

    id: UUID
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Invitation:
    """Whoever has its token joins as `role`, once, before `expires_at`."""

    id: UUID
    org_id: UUID
    role: OrgRole
    invited_by: UUID
    created_at: datetime
    expires_at: datetime


MANAGING_SCOPES = frozenset({"billing:write"})
"""What changes an organisation's money and budgets: owners' and admins'."""


def scopes_within(role: OrgRole, scopes: tuple[str, ...]) -> tuple[str, ...]:
    """What of a person's scopes holds in an organisation where they have this role, for themselves and their keys."""
    if role is not OrgRole.MEMBER:
        return scopes
    return tuple(scope for scope in scopes if scope not in MANAGING_SCOPES)


def check_may_manage(own: OrgRole, other: OrgRole) -> None:
    """Raise NotAllowedInOrganization unless a member may manage those of a role: owners all, admins all but owners."""
    if own is OrgRole.MEMBER or (own is OrgRole.ADMIN and other is OrgRole.OWNER):
        raise NotAllowedInOrganization()
