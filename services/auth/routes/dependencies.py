"""What routes ask for: the services, where a request came from, and who acts."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated
from uuid import UUID

import structlog
from fastapi import Depends, Query, Request

from services.auth.domain import USER_AGENT_CHARS_MAX, Actor, Origin
from services.auth.service import Services
from shared.web import AnyCaller, Caller


async def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def origin(request: Request, identity: AnyCaller) -> Origin:
    """Address as the gateway saw it, in the signed header or beside it."""
    offered = identity.address or request.headers.get("x-forwarded-for", "").split(",")[0].strip()
    agent = request.headers.get("user-agent", "")
    return Origin(
        request_id=request.state.request_id,
        address=_address(offered),
        user_agent="".join(c for c in agent if c.isprintable())[:USER_AGENT_CHARS_MAX],
    )


AllServices = Annotated[Services, Depends(services)]
From = Annotated[Origin, Depends(origin)]


async def actor(services: AllServices, identity: Caller, origin: From) -> Actor:
    """Who acts, refused unless account and session are live."""
    resolved = await services.access.resolve(identity, origin)
    structlog.contextvars.bind_contextvars(user_id=identity.user_id, org_id=identity.org_id)
    return resolved


CurrentActor = Annotated[Actor, Depends(actor)]


async def actor_in(
    services: AllServices,
    identity: Caller,
    origin: From,
    organization_id: Annotated[
        UUID | None, Query(description="One of the caller's organisations; by default the token's or the key's.")
    ] = None,
) -> Actor:
    """As `actor`, in the organisation that the request names."""
    resolved = await services.access.resolve(identity, origin, organization_id)
    structlog.contextvars.bind_contextvars(user_id=identity.user_id, org_id=resolved.identity.org_id)
    return resolved


ActorInOrganization = Annotated[Actor, Depends(actor_in)]


def _address(text: str) -> str | None:
    try:
        return str(ip_address(text))
    except ValueError:
        return None
