"""The relay: bytes in, bytes out, to one replica of the service that owns the path.

    body read or streaming ─► connect (next replica if refused) ─► first byte ─► chunks as they come ─► end
         413, 408               503                                 502, 504         the connection breaks

Nothing is buffered but small bodies that have arrived whole anyway. Back-pressure: the next chunk is read when the
client has taken the last. A request is sent again only when it was never sent: its connection was refused. From the
moment the body is in, a listener waits for the client to hang up and then cancels what runs, which closes the
upstream connection. A response that fails after it began ends without its proper end, so that no client can take a
broken stream for a complete one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from services.gateway.caches import BoundedCache
from services.gateway.errors import ClientGone, RequestTimeout, ResponseBroken
from services.gateway.exchange import Exchange, RawHeaders
from services.gateway.upstreams import Replica, Upstream
from services.gateway.usage import BUILD_HEADER
from services.gateway.watch import Stopped, Timeouts, Watch
from shared.clock import Clock
from shared.errors import BadGateway, PayloadTooLarge, Timeout, TollgateError, Unavailable
from shared.identity import HEADER, Identity, IdentityRing
from shared.telemetry import GatewayMetrics, inject_trace

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
NOT_FORWARDED = HOP_BY_HOP | frozenset(
    (
        b"authorization",
        b"content-length",
        b"expect",
        b"forwarded",
        b"host",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"x-request-id",
    )
)
NOT_RETURNED = HOP_BY_HOP | frozenset(
    (
        b"content-security-policy",
        b"date",
        b"referrer-policy",
        b"server",
        b"via",
        b"x-content-type-options",
        b"x-frame-options",
        b"x-powered-by",
        b"x-request-id",
    )
)
INTERNAL_PREFIX = b"x-tollgate-"
WHOLE_BYTES_MAX = 64 * 1024  # a response known to be this small goes out in one piece, or as a clean 502
CONNECTIONS_MAX = 4_096
SIGNED_ENTRIES_MAX = 10_000
SIGNED_TTL_S = 1.0
KEEPALIVE_S = 30.0  # shorter than the services' own, so that they never hang up on a request that we begin


def create_session(connect_timeout_ms: int) -> aiohttp.ClientSession:
    """The process's one session: no cookies, no decompression, no proxy settings, no time limit of its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_read=None, sock_connect=connect_timeout_ms / 1000),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
    )


async def reach(session: aiohttp.ClientSession, upstream: Upstream) -> None:
    """Raise Unavailable unless one replica's process answers: for /readyz."""
    for replica in upstream.attempts():
        try:
            async with session.get(f"{replica.url}/healthz", allow_redirects=False) as response:
                if response.status == 200:
                    return
        except (aiohttp.ClientError, OSError):
            continue
    raise Unavailable(code="unreachable")


class ConnectionBroken(aiohttp.ClientError):
    """A connection broke after the request, or a part of it, was sent."""


async def send_once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keeps aiohttp from sending GET, PUT and DELETE again when a kept connection breaks: it repeats what fails with
    ClientOSError or ServerDisconnectedError, and nothing else.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as e:
        raise ConnectionBroken(type(e).__name__) from e


class Relay:
    """See the module."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        ring: IdentityRing,
        clock: Clock,
        metrics: GatewayMetrics,
        timeouts: Timeouts,
        body_bytes_max: int,
    ) -> None:
        self._session = session
        self._ring = ring
        self._tokens: BoundedCache[tuple[Identity, str], str] = BoundedCache(
            clock, entries_max=SIGNED_ENTRIES_MAX, ttl_s=SIGNED_TTL_S
        )
        self._errors = metrics.upstream_errors
        self._timeouts = timeouts
        self._body_bytes_max = body_bytes_max

    async def forward(self, exchange: Exchange, upstream: Upstream, identity: Identity) -> None:
        """Answer the exchange with what the service says.

        Raises PayloadTooLarge, RequestTimeout, BadGateway, Unavailable or Timeout before the response has begun,
        ResponseBroken after, ClientGone at any time.
        """
        watch = Watch(exchange, self._timeouts)
        body = _RequestBody(exchange, watch, self._body_bytes_max)
        try:
            with watch:
                await body.open()
                await self._exchange(exchange, upstream, identity, body)
        except Stopped as e:
            raise self._stopped(e, upstream, exchange, body) from None
        except (aiohttp.ClientError, OSError) as e:
            if body.failure is not None:
                raise body.failure from e
            self._errors.labels(upstream.name, "broken").inc()
            if exchange.status:
                raise ResponseBroken(f"{upstream.name}: {type(e).__name__}") from e
            raise BadGateway(detail=f"{upstream.name}: {type(e).__name__}") from e

    def _stopped(self, stop: Stopped, upstream: Upstream, exchange: Exchange, body: _RequestBody) -> Exception:
        if stop.reason == "gone":
            return ClientGone()
        if not body.complete:
            return RequestTimeout() if not exchange.status else ResponseBroken("the request body stalled")
        self._errors.labels(upstream.name, "timeout").inc()
        if exchange.status:
            return ResponseBroken(f"{upstream.name}: {stop.reason} timeout")
        return Timeout(detail=f"{upstream.name}: {stop.reason} timeout")

    async def _exchange(self, exchange: Exchange, upstream: Upstream, identity: Identity, body: _RequestBody) -> None:
        headers = self._request_headers(exchange, identity, body)
        for replica in upstream.attempts():
            replica.outstanding += 1
            try:
                response = await self._send(exchange, replica, headers, body)
                if response is None:
                    self._errors.labels(upstream.name, "refused").inc()
                    upstream.pause(replica)
                    continue
                try:
                    await self._answer(exchange, response, body.watch)
                finally:
                    response.close()  # a response that was read to its end has let go of its connection already
                return
            finally:
                replica.outstanding -= 1
        raise Unavailable(retry_after_s=1, detail=f"{upstream.name}: no replica accepts connections")

    async def _send(
        self, exchange: Exchange, replica: Replica, headers: CIMultiDict[str], body: _RequestBody
    ) -> aiohttp.ClientResponse | None:
        """The response's head; None when the connection was refused, so that nothing was sent."""
        target = replica.url + exchange.raw_path.decode("latin-1")
        if exchange.query:
            target += "?" + exchange.query.decode("latin-1")
        try:
            return await self._session.request(
                exchange.method,
                URL(target, encoded=True),
                headers=headers,
                data=body.data,
                allow_redirects=False,
                middlewares=(send_once,),
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return None

    async def _answer(self, exchange: Exchange, response: aiohttp.ClientResponse, watch: Watch) -> None:
        watch.first_byte()
        exchange.build = response.headers.get(BUILD_HEADER, "")
        headers = _response_headers(response, exchange.extra_headers)
        length = response.content_length
        if length is not None and length <= WHOLE_BYTES_MAX:
            data = await response.content.read()
            await exchange.start(response.status, headers)
            await exchange.body(data, more=False)
            return
        await exchange.start(response.status, headers)
        async for chunk in response.content.iter_any():
            watch.progress()
            await exchange.body(chunk, more=True)
            watch.progress()
        await exchange.body(b"", more=False)

    def _request_headers(self, exchange: Exchange, identity: Identity, body: _RequestBody) -> CIMultiDict[str]:
        dropped = NOT_FORWARDED | _named_in_connection(exchange.raw_headers)
        headers: CIMultiDict[str] = CIMultiDict()
        for name, value in exchange.raw_headers:
            if name not in dropped and not name.startswith(INTERNAL_PREFIX):
                headers.add(name.decode("latin-1"), _text(value))
        if body.length is not None and not isinstance(body.data, bytes):
            headers["content-length"] = str(body.length)
        headers["x-request-id"] = exchange.request_id
        headers["x-forwarded-for"] = exchange.address
        headers[HEADER] = self._signed(identity)
        inject_trace(headers)
        return headers

    def _signed(self, identity: Identity) -> str:
        """The identity header; the same for a second, which is a small part of its life."""
        name = (identity, identity.address)  # an identity's equality leaves out its address
        token = self._tokens.get(name)
        if token is None:
            token = self._ring.sign(identity)
            self._tokens.put(name, token)
        return token


class _RequestBody:
    """The client's body: whole when it came in one piece, else a stream; never more than the limit."""

    def __init__(self, exchange: Exchange, watch: Watch, bytes_max: int) -> None:
        self._exchange = exchange
        self._bytes_max = bytes_max
        length = exchange.header(b"content-length")
        self.length = int(length) if length is not None and length.isascii() and length.isdigit() else None
        self.watch = watch
        self.data: bytes | AsyncIterator[bytes] | None = None
        self.complete = False
        self.failure: TollgateError | ClientGone | None = None

    async def open(self) -> None:
        """Read the first piece. Raises PayloadTooLarge, ClientGone."""
        first, more = await self._next()
        if more:
            self.data = self._stream(first)
            return
        self.data = first or None
        self._end()

    async def _stream(self, first: bytes) -> AsyncIterator[bytes]:
        more = True
        if first:
            yield first
        while more:
            try:
                piece, more = await self._next()
            except (TollgateError, ClientGone) as e:
                self.failure = e  # aiohttp reports only that writing failed
                raise
            if piece:
                yield piece
        self._end()

    async def _next(self) -> tuple[bytes, bool]:
        message = await self._exchange.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if self._exchange.bytes_in > self._bytes_max:
            raise too_large(self._bytes_max)
        self.watch.progress()
        return message.get("body", b""), message.get("more_body", False)

    def _end(self) -> None:
        self.complete = True
        self.watch.body_complete()


def too_large(bytes_max: int) -> PayloadTooLarge:
    """413; the connection closes, since the rest of the body is still on its way."""
    return PayloadTooLarge(f"The body is larger than {bytes_max} bytes.", headers={"connection": "close"})


def _response_headers(response: aiohttp.ClientResponse, own: Mapping[str, str]) -> RawHeaders:
    """The service's headers without those that are hop-by-hop, internal, or the gateway's `own`."""
    dropped = NOT_RETURNED | _named_in_connection(response.raw_headers)
    headers: RawHeaders = []
    has_policy = False
    for name, value in response.raw_headers:
        lower = name.lower()
        if lower in dropped or lower.startswith(INTERNAL_PREFIX) or lower.decode("latin-1") in own:
            continue
        has_policy = has_policy or lower == b"cache-control"
        headers.append((lower, value))
    if not has_policy:
        headers.append((b"cache-control", b"no-store"))
    return headers


def _named_in_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The names that any Connection header declares to be for this hop only."""
    return frozenset(
        option.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for option in value.split(b",")
    )


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
