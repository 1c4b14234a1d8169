"""What all relayed requests share: where they go, who may ask, how long they may take, and what is noted of them.

One sweep every SWEEP_S, while anything runs, looks for what is late: so progress costs a request an assignment, and a
limit is kept to within SWEEP_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind

from services.gateway.access_log import AccessLog
from services.gateway.addresses import ClientAddresses
from services.gateway.admission import Admission
from services.gateway.exchange import SECURITY_HEADERS, STRICT_POLICY, TRANSPORT_POLICY
from services.gateway.heads import STATUS_LINES, RawHeaders, RequestHead
from services.gateway.known import KnownHeads
from services.gateway.relayed import Relayed
from services.gateway.replicas import Upstream
from services.gateway.usage import UsageEvents
from shared.errors import TollgateError
from shared.identity import HEADER, Identity, IdentityRing
from shared.limits import Lease
from shared.telemetry import GatewayMetrics, HttpMetrics, get_logger

log = get_logger(__name__)

SWEEP_S = 0.1
COOKIES_FOR = "auth"  # only auth sets cookies, and reads them
SIGNED_MAX = 10_000
SIGNED_TTL_S = 1.0
PREFLIGHT_AGE_S = 600


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`first_byte_s`: from the complete request to the head of the response. `idle_s`: between two pieces of either
    body, also while the client does not read. `total_s`: the whole exchange. `drain_idle_s`: how long a client's
    connection that idles stays when the process drains."""

    first_byte_s: float
    idle_s: float
    total_s: float
    drain_idle_s: float = 1.0


class Cors:
    """Which pages of other origins may read our answers: none, some, or all. Credentials travel in Authorization, never
    in cookies, so that none are to be allowed."""

    EXPOSED = (
        b"x-request-id, retry-after, ratelimit, ratelimit-policy, x-ratelimit-limit-requests, "
        b"x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
    )

    def __init__(self, origins: str) -> None:
        self._origins = frozenset(o.strip().encode() for o in origins.split(",") if o.strip())

    def lines(self, origin: bytes) -> list[bytes]:
        """The headers of a response to a page of that origin."""
        if b"*" in self._origins:
            allowed = b"access-control-allow-origin: *\r\n"
        elif origin in self._origins:
            allowed = b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origin
        else:
            return []
        return [allowed, b"access-control-expose-headers: %b\r\n" % self.EXPOSED]

    def preflight(self, known: Mapping[bytes, bytes]) -> list[bytes]:
        """The headers of the answer to a preflight; empty where the origin is not allowed, or it is none. What
        `_response_head` adds to every answer is not here."""
        if b"access-control-request-method" not in known or not self.lines(known.get(b"origin", b"")):
            return []
        return [
            b"access-control-allow-methods: GET, POST, PUT, PATCH, DELETE\r\n",
            b"access-control-allow-headers: authorization, content-type, x-api-key, x-request-id\r\n",
            b"access-control-max-age: %d\r\n" % PREFLIGHT_AGE_S,
        ]


class Relay:
    """See the module. `loop` is the running one."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        admission: Admission,
        ring: IdentityRing,
        usage: UsageEvents,
        access_log: AccessLog,
        gateway_metrics: GatewayMetrics,
        http_metrics: HttpMetrics,
        timeouts: Timeouts,
        cors: Cors,
        addresses: ClientAddresses,
        body_bytes_max: int,
        gzip_bytes_min: int,
        is_public_tls: bool,
        tracing: bool,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.now_s = self.loop.time
        self.upstreams = upstreams
        self.admission = admission
        self.timeouts = timeouts
        self.cors = cors
        self.addresses = addresses
        self.body_bytes_max = body_bytes_max
        self.gzip_bytes_min = gzip_bytes_min
        self._headers = [STRICT_POLICY, *SECURITY_HEADERS, *([TRANSPORT_POLICY] if is_public_tls else [])]
        self._openings: dict[int, bytes] = {}
        self._openings_with: RawHeaders = []
        self._ring = ring
        self._usage = usage
        self._access_log = access_log
        self._errors = gateway_metrics.upstream_errors
        self._metrics = http_metrics
        self.is_tracing = tracing
        self.known_heads = KnownHeads()
        self._tracer = trace.get_tracer("tollgate") if tracing else None
        self._signed: dict[tuple[str, str, str], tuple[float, Identity, bytes]] = {}
        self._active: set[Relayed] = set()
        self._ended: list[tuple[Relayed, float]] = []  # and not noted yet
        http_metrics.in_flight.set_function(lambda: len(self._active))
        self._is_sweeping = False

    def began(self, exchange: Relayed) -> None:
        """A request is to be answered."""
        now_s = self.now_s()
        exchange.began_s = now_s
        exchange.due_s = now_s + self.timeouts.idle_s
        exchange.end_s = now_s + self.timeouts.total_s
        self._active.add(exchange)
        if not self._is_sweeping:
            self._is_sweeping = True
            self.loop.call_later(SWEEP_S, self._sweep)

    def ended(self, exchange: Relayed, lease: Lease | None) -> None:
        """A request was answered, or never will be. What is noted of it waits until the answer has left, as it does
        at the end of the loop's turn that wrote it."""
        self._active.discard(exchange)
        if lease is not None:
            self.admission.release(lease)
        if not self._ended:
            self.loop.call_soon(self._note)
        self._ended.append((exchange, self.now_s() - exchange.began_s))

    def close(self) -> None:
        """Break what still runs, once the drain's time is over."""
        for exchange in list(self._active):
            exchange.client_gone()
        self._note()

    def own_lines(self, exchange: Relayed, head: RequestHead) -> bytes:
        """What the gateway itself tells the service: who asks, from where, under which id; cookies only to auth."""
        assert exchange.identity is not None
        lines = [f"x-request-id: {exchange.request_id}\r\n".encode(), self._caller_lines(exchange.identity)]
        if exchange.service == COOKIES_FOR and (cookie := head.known.get(b"cookie")) is not None:
            lines.append(b"cookie: %b\r\n" % cookie)
        if exchange.span is not None:
            carrier: dict[str, str] = {}
            propagate.inject(carrier, trace.set_span_in_context(exchange.span))
            lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in carrier.items()]
        return b"".join(lines)

    def _caller_lines(self, identity: Identity) -> bytes:
        """The caller's address, and the signed header; the same for a second, which is a small part of its life."""
        name = (identity.key_id, identity.user_id, identity.address)
        kept = self._signed.get(name)
        now_s = self.now_s()
        if kept is not None and kept[0] > now_s and (kept[1] is identity or kept[1] == identity):
            return kept[2]
        if len(self._signed) >= SIGNED_MAX:
            self._signed.clear()
        text = f"x-forwarded-for: {identity.address}\r\n{HEADER}: {self._ring.sign(identity)}\r\n"
        lines = text.encode("latin-1")
        self._signed[name] = (now_s + SIGNED_TTL_S, identity, lines)
        return lines

    def trace_begin(self, exchange: Relayed, head: RequestHead) -> None:
        """Open the request's span, under the client's own where it named one."""
        assert self._tracer is not None
        given = {name: head.text(name.encode()) or "" for name in ("traceparent", "tracestate")}
        parent = propagate.extract({name: value for name, value in given.items() if value})
        exchange.span = self._tracer.start_span(
            f"{exchange.method} {exchange.path}", context=parent, kind=SpanKind.SERVER
        )

    def opening(self, status: int, headers: RawHeaders) -> bytes:
        """How every response begins; uvicorn makes its list of headers anew each second, and not more often."""
        if self._openings_with is not headers:
            self._openings_with = headers
            self._openings.clear()
        opening = self._openings.get(status)
        if opening is None:
            lines = b"".join([b"%b: %b\r\n" % header for header in [*headers, *self._headers]])
            opening = self._openings[status] = STATUS_LINES[status] + lines
        return opening

    def count_error(self, upstream: str, code: str) -> None:
        self._errors.labels(upstream, code).inc()

    @staticmethod
    def warn(exchange: Relayed, error: TollgateError) -> None:
        """Log what the client is not told."""
        event = "response_broken" if exchange.status else "request_failed"
        log.warning(
            event,
            request_id=exchange.request_id,
            endpoint=exchange.route,
            code=error.code,
            status=exchange.status or error.status,
            detail=error.detail,
        )

    def _note(self) -> None:
        ended, self._ended = self._ended, []
        ended_at = datetime.now(UTC)
        for exchange, duration_s in ended:
            self._metrics.observe(exchange.method, exchange.route, exchange.status, duration_s)
            self._usage.record(exchange, ended_at, duration_s)
            self._access_log.write(exchange, ended_at, duration_s)
            if exchange.span is not None:
                exchange.span.set_attribute("http.response.status_code", exchange.status)
                exchange.span.end()

    def _sweep(self) -> None:
        now_s = self.now_s()
        for exchange in [e for e in self._active if now_s >= e.due_s or now_s >= e.end_s]:
            exchange.late()
        self._is_sweeping = bool(self._active)
        if self._is_sweeping:
            self.loop.call_later(SWEEP_S, self._sweep)
