"""What stands on the public port beside the relay: the gateway's own pages, and 404 for every path that is nobody's.

Relayed paths never come here: protocol.py takes them out before.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from starlette.types import Receive, Scope, Send

from services.gateway.access_log import AccessLog
from services.gateway.addresses import ClientAddresses
from services.gateway.exchange import TRANSPORT_POLICY, PageExchange
from services.gateway.heads import read_request
from services.gateway.pages import Pages
from services.gateway.target import normal_form_error
from shared.errors import Internal, NotFound, TollgateError
from shared.telemetry import HttpMetrics, get_logger

log = get_logger(__name__)


class Edge:
    """See the module: an ASGI application."""

    def __init__(
        self,
        *,
        pages: Pages,
        access_log: AccessLog,
        metrics: HttpMetrics,
        addresses: ClientAddresses,
        is_public_tls: bool,
    ) -> None:
        self._pages = pages
        self._access_log = access_log
        self._metrics = metrics
        self._addresses = addresses
        self._is_public_tls = is_public_tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the gateway speaks HTTP, not {scope['type']}")
        exchange = PageExchange(scope, receive, send)
        exchange.address = self._addresses.of(exchange.address, exchange.raw_headers)
        if self._is_public_tls:
            exchange.extra_headers.append(TRANSPORT_POLICY)
        started = time.perf_counter()
        try:
            await self._answer(exchange)
        except TollgateError as e:
            await exchange.fail(e)
        except Exception:
            log.exception("request_crashed", request_id=exchange.request_id, endpoint=exchange.route)
            await exchange.fail(Internal())
        finally:
            duration_s = time.perf_counter() - started
            self._metrics.observe(exchange.method, exchange.route, exchange.status, duration_s)
            if exchange.route not in Pages.UNLOGGED:
                self._access_log.write(exchange, datetime.now(UTC), duration_s)

    async def _answer(self, exchange: PageExchange) -> None:
        if (error := normal_form_error(exchange.path, exchange.url)) is not None:
            raise error()
        read_request(exchange.raw_headers)
        if not await self._pages.answer(exchange):
            raise NotFound()
