"""The internal listener: /metrics, and health for supervisors that look there. Never reachable from outside."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.types import Receive, Scope, Send

from services.gateway.exchange import PageExchange
from services.gateway.pages import NO_STORE, Pages
from shared.errors import NotFound, TollgateError

HEALTH = ("/healthz", "/readyz")


class InternalPages:
    """A second, small ASGI application."""

    def __init__(self, pages: Pages, registry: CollectorRegistry) -> None:
        self._pages = pages
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = PageExchange(scope, receive, send)
        try:
            if exchange.path == "/metrics" and exchange.method == "GET":
                kind = (b"content-type", CONTENT_TYPE_LATEST.encode())
                await exchange.respond(200, [kind, NO_STORE], generate_latest(self._registry))
            elif exchange.path not in HEALTH or not await self._pages.answer(exchange):
                raise NotFound()
        except TollgateError as e:
            await exchange.fail(e)
