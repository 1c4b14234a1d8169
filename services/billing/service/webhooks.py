"""Webhook endpoints, as customers manage them, and the outbox that events go through."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from services.billing.errors import TooManyEndpoints, WebhookDisabled, WebhookNotFound, WebhooksNotOffered
from services.billing.ledger.operations import OpenWallet
from services.billing.ledger.writer import Ledger
from services.billing.repository import webhooks as repository
from services.billing.repository.database import Connection, Database
from services.billing.repository.webhooks import Delivery, Endpoint
from services.billing.service.author import Author, once
from services.billing.webhooks.destination import check_url
from services.billing.webhooks.signature import SecretName, SecretRing
from shared.ids import uuid7

ENDPOINTS_MAX = 10
SECRET_GRACE_S = 24 * 3_600
TEST_EVENT = "webhook.test"


@dataclass(frozen=True, slots=True)
class NewSecret:
    """An endpoint with its secret, which is shown when it is made and when it is changed."""

    endpoint: Endpoint
    secret: str


class Webhooks:
    """One for the life of the process; without a ring nothing is offered. Writes are once by their author's key."""

    def __init__(self, database: Database, ledger: Ledger, ring: SecretRing | None, *, private: bool) -> None:
        self._database = database
        self._ledger = ledger
        self._ring = ring
        self._private = private

    async def endpoints(self, org_id: UUID) -> list[Endpoint]:
        """Oldest first; at most ENDPOINTS_MAX."""
        return await repository.endpoints(self._database, org_id)

    async def deliveries(self, org_id: UUID, endpoint_id: UUID, limit: int) -> list[Delivery]:
        """The newest events of an endpoint, and what came of them. Raises WebhookNotFound."""
        _one_of(await self.endpoints(org_id), endpoint_id)
        return await repository.deliveries(self._database, endpoint_id, limit)

    async def add(self, author: Author, org_id: UUID, url: str) -> NewSecret:
        """Raises UnsafeDestination, TooManyEndpoints."""
        ring = self._offered()
        check_url(url, private=self._private)
        await self._ledger.submit(OpenWallet(org_id))
        endpoint_id = uuid7()

        async def work(connection: Connection) -> dict[str, object]:
            if len(await repository.lock_endpoints(connection, org_id)) >= ENDPOINTS_MAX:
                raise TooManyEndpoints()
            await repository.insert_endpoint(connection, endpoint_id, org_id, url, ring.current)
            return {"id": endpoint_id, "version": 1}

        made = await once(self._database, author, "webhook", {"org": org_id, "url": url}, work)
        return await self._with_secret(org_id, UUID(made["id"]), made["version"])

    async def rotate(self, author: Author, org_id: UUID, endpoint_id: UUID) -> NewSecret:
        """A new secret; the old one signs too for SECRET_GRACE_S. Raises WebhookNotFound."""
        self._offered()

        async def work(connection: Connection) -> dict[str, object]:
            found = _one_of(await repository.lock_endpoints(connection, org_id), endpoint_id)
            await repository.next_secret(connection, endpoint_id, SECRET_GRACE_S)
            return {"version": found.secret_version + 1}

        body = {"org": org_id, "id": endpoint_id}
        made = await once(self._database, author, "webhook_rotate", body, work)
        return await self._with_secret(org_id, endpoint_id, made["version"])

    async def remove(self, author: Author, org_id: UUID, endpoint_id: UUID) -> None:
        """With everything that is on its way to it. Raises WebhookNotFound."""

        async def work(connection: Connection) -> dict[str, object]:
            _one_of(await repository.lock_endpoints(connection, org_id), endpoint_id)
            await repository.delete_endpoint(connection, endpoint_id)
            return {}

        await once(self._database, author, "webhook_remove", {"org": org_id, "id": endpoint_id}, work)

    async def enable(self, author: Author, org_id: UUID, endpoint_id: UUID) -> None:
        """Deliver again what comes from now on. Raises WebhookNotFound."""

        async def work(connection: Connection) -> dict[str, object]:
            _one_of(await repository.lock_endpoints(connection, org_id), endpoint_id)
            await repository.enable(connection, endpoint_id)
            return {}

        await once(self._database, author, "webhook_enable", {"org": org_id, "id": endpoint_id}, work)

    async def test(self, author: Author, org_id: UUID, endpoint_id: UUID) -> UUID:
        """Send an event that means nothing, to this endpoint only; its id. Raises WebhookNotFound, WebhookDisabled."""
        event_id = uuid7()

        async def work(connection: Connection) -> dict[str, object]:
            found = _one_of(await repository.lock_endpoints(connection, org_id), endpoint_id)
            if found.disabled_reason is not None:
                raise WebhookDisabled()
            body = event_body(TEST_EVENT, {"org_id": str(org_id)})
            await repository.emit(connection, event_id, org_id, TEST_EVENT, body, [endpoint_id])
            return {"event_id": event_id}

        sent = await once(self._database, author, "webhook_test", {"org": org_id, "id": endpoint_id}, work)
        return UUID(sent["event_id"])

    def _offered(self) -> SecretRing:
        if self._ring is None:
            raise WebhooksNotOffered()
        return self._ring

    async def _with_secret(self, org_id: UUID, endpoint_id: UUID, version: int) -> NewSecret:
        found = _one_of(await self.endpoints(org_id), endpoint_id)
        return NewSecret(found, self._offered().printed(SecretName(found.id, found.secret_kid, version)))


async def emit(connection: Connection, org_id: UUID, kind: str, data: Mapping[str, object]) -> None:
    """An event for every endpoint of a wallet that is not disabled, in the caller's transaction."""
    ids = await repository.enabled_endpoints(connection, org_id)
    if ids:
        await repository.emit(connection, uuid7(), org_id, kind, event_body(kind, data), ids)


def event_body(kind: str, data: Mapping[str, object]) -> str:
    """As the specification has it: type, timestamp, data."""
    return json.dumps({"type": kind, "timestamp": datetime.now(UTC).isoformat(), "data": data}, separators=(",", ":"))


def _one_of(endpoints: list[Endpoint], endpoint_id: UUID) -> Endpoint:
    for endpoint in endpoints:
        if endpoint.id == endpoint_id:
            return endpoint
    raise WebhookNotFound()
