"""Whom providers vouch for, and sign-ins through them that were begun."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import delete, insert, select

from services.auth.domain.oidc import ExternalPerson, OidcFlow
from services.auth.tables import ExternalIdentityRow, OidcFlowRow
from shared.database import AsyncSession


class ExternalRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def user_of(self, person: ExternalPerson) -> UUID | None:
        """The user that a provider's subject is linked to."""
        return await self._session.scalar(
            select(ExternalIdentityRow.user_id).where(
                ExternalIdentityRow.issuer == person.issuer, ExternalIdentityRow.subject == person.subject
            )
        )

    async def link(self, person: ExternalPerson, user_id: UUID, now: datetime) -> None:
        await self._session.execute(
            insert(ExternalIdentityRow).values(
                issuer=person.issuer, subject=person.subject, user_id=user_id, created_at=now
            )
        )

    async def add_flow(self, digest: str, flow: OidcFlow) -> None:
        await self._session.execute(
            insert(OidcFlowRow).values(
                digest=digest,
                provider=flow.provider,
                nonce=flow.nonce,
                verifier=flow.verifier,
                return_to=flow.return_to,
                expires_at=flow.expires_at,
            )
        )

    async def take_flow(self, digest: str, provider: str, now: datetime) -> OidcFlow | None:
        """A sign-in that was begun, which is used up."""
        statement = delete(OidcFlowRow).where(
            OidcFlowRow.digest == digest, OidcFlowRow.provider == provider, OidcFlowRow.expires_at > now
        )
        row = (await self._session.scalars(statement.returning(OidcFlowRow))).one_or_none()
        return OidcFlow(row.provider, row.nonce, row.verifier, row.return_to, row.expires_at) if row else None

    async def prune_flows(self, now: datetime, batch_max: int) -> int:
        """Delete sign-ins that nobody finished; at most `batch_max`. How many went."""
        old = select(OidcFlowRow.digest).where(OidcFlowRow.expires_at <= now).limit(batch_max)
        gone = await self._session.scalars(
            delete(OidcFlowRow).where(OidcFlowRow.digest.in_(old)).returning(OidcFlowRow.digest)
        )
        return len(gone.all())
