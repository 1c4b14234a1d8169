"""The relay between two wires that tests hold in their hands: no sockets, so that every byte comes when a test says."""

import asyncio
import base64
import io
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from services.gateway.access_log import AccessLog
from services.gateway.addresses import ClientAddresses
from services.gateway.admission import Admitted
from services.gateway.pool import UpstreamConnection
from services.gateway.protocol import EdgeProtocol
from services.gateway.relay import Cors, Relay, Timeouts
from services.gateway.replicas import PoolSettings, Upstream
from services.gateway.target import Targets
from services.gateway.upstreams import RouteTable
from shared.clock import SystemClock
from shared.identity import Identity, IdentityRing
from shared.telemetry import GatewayMetrics, HttpMetrics

RING = f"wire:{base64.b64encode(b'w' * 32).decode()}"


class Wire:
    """A transport: what was written, and whether it was closed or is not read."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_closed = self.is_held = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        self.is_held = True

    def resume_reading(self) -> None:
        self.is_held = False

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def take(self) -> bytes:
        """What was written since the last look."""
        taken = bytes(self.written)
        self.written.clear()
        return taken


class _Admission:
    def begin(self, _route: Any, _method: Any, head: Any, *_: Any) -> Any:
        head.asker = self  # so that the head is remembered
        return Admitted(Identity(kind="key", org_id="o", user_id="u", key_id="k", scopes=("*",)), b"", None)

    def release(self, _lease: Any) -> None:
        raise AssertionError("there was none")


class _Usage:
    def record(self, *_: Any) -> None:
        """Nobody counts here."""


class Wired:
    """A client's connection and a service's, with the gateway's relay between them."""

    def __init__(self, **options: Any) -> None:
        clock, registry = SystemClock(), CollectorRegistry()
        metrics = GatewayMetrics(registry)
        self.upstream = Upstream("chat", ["http://service:1"], clock, PoolSettings(), metrics)
        values: dict[str, Any] = {
            "upstreams": {"chat": self.upstream},
            "admission": _Admission(),
            "ring": IdentityRing(RING, clock),
            "usage": _Usage(),
            "access_log": AccessLog("gateway", out=io.StringIO()),
            "gateway_metrics": metrics,
            "http_metrics": HttpMetrics(registry, "gateway"),
            "timeouts": Timeouts(first_byte_s=300, idle_s=60, total_s=3_600),
            "cors": Cors(""),
            "addresses": ClientAddresses(),
            "body_bytes_max": 100_000,
            "gzip_bytes_min": 4_096,
            "is_public_tls": False,
            "tracing": False,
        }
        self.relay = Relay(**values | options)
        self.client, self.service = Wire(), Wire()
        self.front = EdgeProtocol(
            self.relay,
            Targets(RouteTable()),
            config=uvicorn.Config(_nobody, http="httptools", ws="none", lifespan="off", log_config=None),
            server_state=ServerState(),
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        self.front.connection_made(self.client)  # type: ignore[arg-type]
        self.back = self.connect()

    def connect(self) -> UpstreamConnection:
        """A connection to the service that waits for a request."""
        self.service = Wire()
        pool = self.upstream.replicas[0].pool
        connection = UpstreamConnection(pool)
        connection.connection_made(self.service)  # type: ignore[arg-type]
        pool.give_back(connection)
        return connection

    async def settle(self) -> None:
        """Let every task do what it can."""
        for _ in range(6):
            await asyncio.sleep(0)

    def close(self) -> None:
        self.front.connection_lost(None)


async def _nobody(_scope: Any, _receive: Any, _send: Any) -> None:
    raise AssertionError("this path is relayed")
