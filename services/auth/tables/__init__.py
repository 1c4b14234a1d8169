"""The tables of schema `auth`; migrations/versions writes the same by hand, with triggers and the view.

Every table that belongs to a tenant has `org_id`; repository.py filters by it in one place.
"""

from __future__ import annotations

from datetime import date, datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Mapped, mapped_column

from services.auth.tables.base import NOW, Base
from services.auth.tables.outside import EmailOutboxRow, EmailTokenRow, ExternalIdentityRow, OidcFlowRow

__all__ = ["Base", "EmailOutboxRow", "EmailTokenRow", "ExternalIdentityRow", "OidcFlowRow"]


class RoleRow(Base):
    """What a person may be on this installation: user, operator, admin."""

    __tablename__ = "role"

    name: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]


class PermissionRow(Base):
    """A scope that exists."""

    __tablename__ = "permission"

    scope: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]


class RolePermissionRow(Base):
    __tablename__ = "role_permission"

    role: Mapped[str] = mapped_column(ForeignKey("role.name"), primary_key=True)
    scope: Mapped[str] = mapped_column(ForeignKey("permission.scope"), primary_key=True)


class PlanRow(Base):
    """Limits that an organisation's keys have unless they set their own."""

    __tablename__ = "plan"
    __table_args__ = (
        CheckConstraint(
            "limits ?& ARRAY['minute', 'hour', 'day', 'concurrency', 'tokens_per_minute']", name="limits_complete"
        ),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]
    limits: Mapped[dict[str, Any]]


class UserRow(Base):
    """Who may own keys: a person, who signs in, or a service account, which never does."""

    __tablename__ = "user_account"
    __table_args__ = (
        CheckConstraint("status IN ('active', 'disabled')", name="status"),
        CheckConstraint(
            "(kind = 'person' AND email IS NOT NULL)"
            " OR (kind = 'service' AND email IS NULL AND display_name IS NOT NULL)",
            name="kind",
        ),
        Index("uq_user_account_username_lower", func.lower(text("username")), unique=True),
        Index("uq_user_account_email_lower", func.lower(text("email")), unique=True),
        # In the order of bytes, in which a beginning is a range.
        Index(
            "ix_user_account_username_prefix",
            func.lower(text("username")).label("folded"),
            postgresql_ops={"folded": "text_pattern_ops"},
        ),
        Index(
            "ix_user_account_email_prefix",
            func.lower(text("email")).label("folded"),
            postgresql_ops={"folded": "text_pattern_ops"},
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    username: Mapped[str]
    email: Mapped[str | None]
    password_hash: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="active")
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)
    kind: Mapped[str] = mapped_column(server_default="person")
    display_name: Mapped[str | None]
    email_verified_at: Mapped[datetime | None]


class UserRoleRow(Base):
    __tablename__ = "user_role"

    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"), primary_key=True)
    role: Mapped[str] = mapped_column(ForeignKey("role.name"), primary_key=True)
    granted_at: Mapped[datetime] = mapped_column(server_default=NOW)


class OrganizationRow(Base):
    """The tenant. Registration makes a personal one."""

    __tablename__ = "organization"
    __table_args__ = (CheckConstraint("status IN ('active', 'suspended')", name="status"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    plan: Mapped[str] = mapped_column(ForeignKey("plan.name"), server_default="default")
    personal: Mapped[bool] = mapped_column(server_default=text("false"))
    status: Mapped[str] = mapped_column(server_default="active")
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class MembershipRow(Base):
    """Who belongs to an organisation, and as what; not to be confused with the roles on the installation."""

    __tablename__ = "membership"
    __table_args__ = (
        CheckConstraint("role IN ('owner', 'admin', 'member')", name="role"),
        Index(None, "user_id"),
    )

    org_id: Mapped[UUID] = mapped_column(ForeignKey("organization.id"), primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"), primary_key=True)
    role: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class SessionRow(Base):
    """One sign-in. `revoked_at` ends the whole family of its refresh tokens; `version` grows with every change that
    its access tokens must not outlive.
    """

    __tablename__ = "session"
    __table_args__ = (Index(None, "user_id", "created_at"), Index(None, "expires_at"))

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    org_id: Mapped[UUID] = mapped_column(ForeignKey("organization.id"))
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str | None]
    user_agent: Mapped[str] = mapped_column(server_default="")
    address: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    version: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))
    browser: Mapped[bool] = mapped_column(server_default=text("false"))


class RefreshTokenRow(Base):
    """A refresh token at rest. It is used once: one that comes back with `used_at` set was stolen, or copied."""

    __tablename__ = "refresh_token"
    __table_args__ = (Index(None, "session_id"),)

    digest: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[UUID] = mapped_column(ForeignKey("session.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class InvitationRow(Base):
    """An open invitation: it goes when it is accepted or withdrawn. Of the token there is a SHA-256."""

    __tablename__ = "invitation"
    __table_args__ = (
        CheckConstraint("role IN ('owner', 'admin', 'member')", name="role"),
        Index("uq_invitation_digest", "digest", unique=True),
        Index(None, "org_id", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    org_id: Mapped[UUID] = mapped_column(ForeignKey("organization.id"))
    role: Mapped[str]
    digest: Mapped[str]
    invited_by: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class SignInAttemptRow(Base):
    """Failed sign-ins of a name, an address, or both together, as a keyed digest; see service/attempts.py."""

    __tablename__ = "sign_in_attempt"
    __table_args__ = (CheckConstraint("failures >= 0", name="failures"), Index(None, "since"))

    subject: Mapped[str] = mapped_column(primary_key=True)
    failures: Mapped[int]
    since: Mapped[datetime]
    blocked_until: Mapped[datetime | None]


class ApiKeyRow(Base):
    """An API key at rest. `version` grows with every change that the gateway must hear of."""

    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("status IN ('active', 'revoked')", name="status"),
        CheckConstraint("(status = 'revoked') = (revoked_at IS NOT NULL)", name="revoked_at"),
        CheckConstraint("version > 0", name="version"),
        CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name="digest"),
        Index("uq_api_key_digest", "digest", unique=True),
        Index(None, "org_id", "id"),
        Index(None, "user_id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    org_id: Mapped[UUID] = mapped_column(ForeignKey("organization.id"))
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    name: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[str]
    pepper: Mapped[int]
    scopes: Mapped[list[str]]
    models: Mapped[list[str] | None]
    limits: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    limit_id: Mapped[UUID]
    version: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))
    status: Mapped[str] = mapped_column(server_default="active")
    expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    allowed_addresses: Mapped[list[str] | None]


class KeyUsageRow(Base):
    """What a key was used for on a day (UTC), as far as the gateways' events came through."""

    __tablename__ = "key_usage"
    __table_args__ = (Index(None, "day"),)

    key_id: Mapped[UUID] = mapped_column(ForeignKey("api_key.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    client_errors: Mapped[int] = mapped_column(BigInteger)
    server_errors: Mapped[int] = mapped_column(BigInteger)
    bytes_in: Mapped[int] = mapped_column(BigInteger)
    bytes_out: Mapped[int] = mapped_column(BigInteger)


class KeyOutboxRow(Base):
    """Changes of keys that Redis must hear of. What was delivered stays for as long as gateways may cache."""

    __tablename__ = "key_outbox"
    __table_args__ = (
        Index("ix_key_outbox_pending", "id", postgresql_where=text("delivered_at IS NULL")),
        Index(None, "delivered_at"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    key_id: Mapped[UUID] = mapped_column(ForeignKey("api_key.id"))
    org_id: Mapped[UUID]
    digest: Mapped[str]
    version: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    delivered_at: Mapped[datetime | None]


class SessionOutboxRow(Base):
    """As KeyOutboxRow, of sessions."""

    __tablename__ = "session_outbox"
    __table_args__ = (
        Index(None, "session_id"),
        Index("ix_session_outbox_pending", "id", postgresql_where=text("delivered_at IS NULL")),
        Index(None, "delivered_at"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    session_id: Mapped[UUID] = mapped_column(ForeignKey("session.id", ondelete="CASCADE"))
    org_id: Mapped[UUID]
    version: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    delivered_at: Mapped[datetime | None]


class SigningKeyRow(Base):
    """A key that signs access tokens. The private half is AES-256-GCM, nonce first, bound to `kid`.

    `retired_at` may lie ahead: until then the key verifies.
    """

    __tablename__ = "signing_key"

    kid: Mapped[str] = mapped_column(primary_key=True)
    public_jwk: Mapped[dict[str, Any]]
    private_key: Mapped[bytes]
    created_at: Mapped[datetime]
    retired_at: Mapped[datetime | None]
    signs_from: Mapped[datetime] = mapped_column(server_default=NOW)


class AuditRow(Base):
    """Append-only: a trigger refuses UPDATE, DELETE and TRUNCATE, and the service's role has no right to them."""

    __tablename__ = "audit_log"
    __table_args__ = (Index(None, "org_id", "id"), Index(None, "actor_user_id", "id"), Index(None, "action", "id"))

    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    action: Mapped[str]
    actor_user_id: Mapped[UUID | None]
    actor_key_id: Mapped[UUID | None]
    org_id: Mapped[UUID | None]
    target_type: Mapped[str]
    target_id: Mapped[UUID | None]
    request_id: Mapped[str] = mapped_column(server_default="")
    address: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    details: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
