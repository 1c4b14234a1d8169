"""The edge: the outermost ASGI application of the public port.

    request ─► shape and size ─► own pages ─► route ─► admission ─► relay ─► response
                400 413 414 431                404 405  401 403 429   502 503 504

Every response carries `x-request-id` and the security headers; every error speaks the dialect of its path. Whatever
happens inside, the exchange is timed, counted, logged, noted for usage, and its place among the concurrent ones
given back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from opentelemetry.trace import SpanKind
from starlette.types import Receive, Scope, Send

from services.gateway.access_log import AccessLog
from services.gateway.addresses import ClientAddresses
from services.gateway.admission import Admission, Admitted, credential_of
from services.gateway.errors import ClientGone, HeadersTooLarge, ResponseBroken, UriTooLong
from services.gateway.exchange import Exchange
from services.gateway.pages import Pages
from services.gateway.relay import Relay, too_large
from services.gateway.upstreams import RouteTable, Upstream
from services.gateway.usage import UsageEvents
from shared.errors import Internal, InvalidRequest, TollgateError, Unauthenticated
from shared.telemetry import HttpMetrics, get_logger, span

log = get_logger(__name__)

URI_BYTES_MAX = 8 * 1024
HEADER_BYTES_MAX = 32 * 1024
HEADERS_MAX = 100
CLIENT_GONE_STATUS = 499  # nginx's number for it, in logs and metrics only
SINGLE_HEADERS = (b"authorization", b"x-api-key", b"content-length", b"host")
FORBIDDEN_SEGMENT = re.compile(r"/\.\.?(/|\Z)")


class Edge:
    """See the module."""

    def __init__(
        self,
        *,
        routes: RouteTable,
        upstreams: Mapping[str, Upstream],
        admission: Admission,
        relay: Relay,
        pages: Pages,
        usage: UsageEvents,
        access_log: AccessLog,
        metrics: HttpMetrics,
        addresses: ClientAddresses,
        body_bytes_max: int,
        tracing: bool,
    ) -> None:
        self._routes = routes
        self._upstreams = upstreams
        self._admission = admission
        self._relay = relay
        self._pages = pages
        self._usage = usage
        self._access_log = access_log
        self._metrics = metrics
        self._addresses = addresses
        self._body_bytes_max = body_bytes_max
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the gateway speaks HTTP, not {scope['type']}")
        exchange = Exchange(scope, receive, send)
        peer = scope["client"][0] if scope.get("client") else ""
        exchange.address = self._addresses.of(peer, exchange.raw_headers)
        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            with self._span(exchange):
                try:
                    await self._answer(exchange)
                finally:
                    self._finish(exchange, time.perf_counter() - started)
        finally:
            self._metrics.in_flight.dec()

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._admit_and_relay(exchange)
        except TollgateError as e:
            if e.detail:
                self._warn("request_failed", exchange, code=e.code, status=e.status, detail=e.detail)
            await self._fail(exchange, e)
        except ClientGone:
            exchange.status = exchange.status or CLIENT_GONE_STATUS
        except ResponseBroken as e:
            # Returning without the end of the body makes the server hang up: the client sees a broken stream.
            self._warn("response_broken", exchange, detail=str(e))
        except Exception:
            log.exception("request_crashed", request_id=exchange.request_id, endpoint=exchange.route)
            await self._fail(exchange, Internal())

    async def _admit_and_relay(self, exchange: Exchange) -> None:
        _check_shape(exchange, self._body_bytes_max)
        if await self._pages.answer(exchange):
            return
        route = self._routes.match(exchange.method, exchange.path)
        exchange.route, exchange.service = route.prefix, route.service
        credential = credential_of(exchange.header(b"authorization"), exchange.header(b"x-api-key"))
        admitted: Admitted = await self._admission.admit(route, exchange.method, credential, exchange.address)
        exchange.identity = admitted.identity
        exchange.extra_headers = admitted.headers
        try:
            await self._relay.forward(exchange, self._upstreams[route.service], admitted.identity)
        except TollgateError as e:
            e.headers.update(admitted.headers)
            raise
        finally:
            if admitted.lease is not None:
                self._admission.release(admitted.lease)

    @staticmethod
    def _warn(event: str, exchange: Exchange, **fields: object) -> None:
        log.warning(event, request_id=exchange.request_id, endpoint=exchange.route, **fields)

    @staticmethod
    async def _fail(exchange: Exchange, error: TollgateError) -> None:
        if not exchange.status:
            await exchange.fail(error)

    def _finish(self, exchange: Exchange, duration_s: float) -> None:
        self._metrics.observe(exchange.method, exchange.route, exchange.status, duration_s)
        ended_at_s = time.time()
        if exchange.service:
            self._usage.record(exchange, ended_at_s, duration_s)
        if exchange.route not in Pages.UNLOGGED:
            self._access_log.write(exchange, ended_at_s, duration_s)

    def _span(self, exchange: Exchange) -> AbstractContextManager[object]:
        if not self._tracing:
            return nullcontext()
        carrier = {k.decode("latin-1"): v.decode("latin-1") for k, v in exchange.first.items()}
        return span(f"{exchange.method} {exchange.path}", SpanKind.SERVER, carrier=carrier)


def _check_shape(exchange: Exchange, body_bytes_max: int) -> None:
    """Raise for what no service should ever see."""
    if len(exchange.raw_path) + len(exchange.query) > URI_BYTES_MAX:
        raise UriTooLong()
    headers = exchange.raw_headers
    if len(headers) > HEADERS_MAX or sum([len(k) + len(v) for k, v in headers]) > HEADER_BYTES_MAX:
        raise HeadersTooLarge()
    if len(exchange.first) != len(headers):
        _check_repeated(exchange)
    path = exchange.path
    if not path.isprintable() or "\\" in path or ("/." in path and FORBIDDEN_SEGMENT.search(path)):
        raise InvalidRequest("The address is not in its normal form.", code="invalid_path")
    length = exchange.first.get(b"content-length")
    if length is not None:
        if not length.isdigit():
            raise InvalidRequest("Content-Length is not a number.", code="invalid_content_length")
        if int(length) > body_bytes_max:
            raise too_large(body_bytes_max)


def _check_repeated(exchange: Exchange) -> None:
    seen: set[bytes] = set()
    for name, _ in exchange.raw_headers:
        if name in seen and name in SINGLE_HEADERS:
            if name in (b"authorization", b"x-api-key"):
                raise Unauthenticated()
            raise InvalidRequest(f"The header {name.decode('latin-1')} may be sent only once.", code="repeated_header")
        seen.add(name)
