"""Where the wallet's events go, and which balances are worth one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from services.billing.repository.webhooks import Delivery, Endpoint
from services.billing.routes.dependencies import AlertService, CustomerAuthor, OwnWallet, WebhookService
from services.billing.routes.fields import PAGE_DEFAULT, Body, PageSize, PositiveCreditsIn
from services.billing.service.webhooks import NewSecret
from services.billing.webhooks.destination import URL_CHARS_MAX
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

THRESHOLDS_MAX = 10


class WebhookBody(Body):
    url: Annotated[str, Field(min_length=1, max_length=URL_CHARS_MAX)]


class WebhookAnswer(BaseModel):
    id: UUID
    url: str
    disabled_reason: str | None = Field(description="Why nothing is delivered any more; null while it is.")
    created_at: datetime


class WebhookSecretAnswer(WebhookAnswer):
    secret: str = Field(description="What signatures are made with, after the Standard Webhooks specification.")


class WebhooksAnswer(BaseModel):
    data: list[WebhookAnswer]


class DeliveryAnswer(BaseModel):
    """`due_at` is the next attempt's time while the status is `pending`."""

    event_id: UUID
    type: str
    status: str
    attempts: int
    due_at: datetime | None
    response_status: int | None
    error: str | None
    created_at: datetime


class DeliveriesAnswer(BaseModel):
    data: list[DeliveryAnswer]


class EventAnswer(BaseModel):
    event_id: UUID


class AlertsBody(Body):
    below: Annotated[list[PositiveCreditsIn], Field(max_length=THRESHOLDS_MAX)]


class AlertAnswer(BaseModel):
    below: str
    is_below: bool


class AlertsAnswer(BaseModel):
    data: list[AlertAnswer]


@router.post("/webhooks", status_code=201)
async def add(body: WebhookBody, service: WebhookService, author: CustomerAuthor) -> WebhookSecretAnswer:
    """Send the wallet's events to this address."""
    return _with_secret(await service.add(author, author.tenant, body.url))


@router.get("/webhooks")
async def webhooks(service: WebhookService, org_id: OwnWallet) -> WebhooksAnswer:
    """Oldest first."""
    return WebhooksAnswer(data=[_answer(endpoint) for endpoint in await service.endpoints(org_id)])


@router.delete("/webhooks/{webhook_id}", status_code=204)
async def remove(webhook_id: UUID, service: WebhookService, author: CustomerAuthor) -> None:
    """With everything that is on its way to it."""
    await service.remove(author, author.tenant, webhook_id)


@router.post("/webhooks/{webhook_id}/rotate")
async def rotate(webhook_id: UUID, service: WebhookService, author: CustomerAuthor) -> WebhookSecretAnswer:
    """A new secret; for a day the old one signs too."""
    return _with_secret(await service.rotate(author, author.tenant, webhook_id))


@router.post("/webhooks/{webhook_id}/enable", status_code=204)
async def enable(webhook_id: UUID, service: WebhookService, author: CustomerAuthor) -> None:
    """Deliver again."""
    await service.enable(author, author.tenant, webhook_id)


@router.post("/webhooks/{webhook_id}/test", status_code=202)
async def test(webhook_id: UUID, service: WebhookService, author: CustomerAuthor) -> EventAnswer:
    """Send it an event of type `webhook.test`."""
    return EventAnswer(event_id=await service.test(author, author.tenant, webhook_id))


@router.get("/webhooks/{webhook_id}/deliveries")
async def deliveries(
    webhook_id: UUID, service: WebhookService, org_id: OwnWallet, limit: Annotated[PageSize, Query()] = PAGE_DEFAULT
) -> DeliveriesAnswer:
    """The newest events, and what came of them."""
    found = await service.deliveries(org_id, webhook_id, limit)
    return DeliveriesAnswer(data=[_delivery(delivery) for delivery in found])


@router.get("/alerts")
async def alerts(service: AlertService, org_id: OwnWallet) -> AlertsAnswer:
    """Balances that are worth an event, the largest first."""
    return _alerts(await service.thresholds(org_id))


@router.put("/alerts")
async def set_alerts(body: AlertsBody, service: AlertService, author: CustomerAuthor) -> AlertsAnswer:
    """Exactly these: an event `wallet.balance_low` each time that the balance falls below one of them."""
    return _alerts(await service.set(author, author.tenant, body.below))


def _answer(endpoint: Endpoint) -> WebhookAnswer:
    return WebhookAnswer(
        id=endpoint.id,
        url=endpoint.url,
        disabled_reason=endpoint.disabled_reason,
        created_at=endpoint.created_at,
    )


def _with_secret(made: NewSecret) -> WebhookSecretAnswer:
    return WebhookSecretAnswer(**_answer(made.endpoint).model_dump(), secret=made.secret)


def _delivery(delivery: Delivery) -> DeliveryAnswer:
    return DeliveryAnswer(
        event_id=delivery.event_id,
        type=delivery.type,
        status=delivery.status,
        attempts=delivery.attempts,
        due_at=delivery.due_at if delivery.status == "pending" else None,
        response_status=delivery.response_status,
        error=delivery.error,
        created_at=delivery.created_at,
    )


def _alerts(thresholds: list[tuple[int, bool]]) -> AlertsAnswer:
    return AlertsAnswer(
        data=[AlertAnswer(below=format_credits(amount), is_below=is_below) for amount, is_below in thresholds]
    )
