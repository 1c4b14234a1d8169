"""What goes out and comes back: e-mails and their tokens, sign-ins through OpenID providers."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from services.auth.tables.base import Base


class EmailOutboxRow(Base):
    """A message to be sent when `due_at` comes; null once that is done. There is no token in it."""

    __tablename__ = "email_outbox"
    __table_args__ = (
        CheckConstraint("purpose IN ('register', 'verify', 'reset')", name="purpose"),
        Index(None, "due_at"),
        Index("ix_email_outbox_address_lower", func.lower(text("address")), "created_at"),
        Index(None, "created_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    address: Mapped[str]
    payload: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime]
    due_at: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))


class EmailTokenRow(Base):
    """A token that was sent, by its SHA-256; it goes when it is used. A registration's account waits in `payload`."""

    __tablename__ = "email_token"
    __table_args__ = (
        CheckConstraint("purpose IN ('register', 'verify', 'reset')", name="purpose"),
        Index(None, "user_id"),
        Index(None, "expires_at"),
    )

    digest: Mapped[str] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    address: Mapped[str]
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    payload: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    expires_at: Mapped[datetime]


class ExternalIdentityRow(Base):
    """A subject of an OpenID provider, and the user that it is here."""

    __tablename__ = "external_identity"
    __table_args__ = (Index(None, "user_id"),)

    issuer: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    created_at: Mapped[datetime]


class OidcFlowRow(Base):
    """A sign-in through a provider that was begun, by the SHA-256 of its state; it goes when it comes back."""

    __tablename__ = "oidc_flow"
    __table_args__ = (Index(None, "expires_at"),)

    digest: Mapped[str] = mapped_column(primary_key=True)
    provider: Mapped[str]
    nonce: Mapped[str]
    verifier: Mapped[str]
    return_to: Mapped[str]
    expires_at: Mapped[datetime]
