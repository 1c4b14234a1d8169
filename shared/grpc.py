"""gRPC between services: servers and channels with authentication, error mapping, tracing and limits built in.

A call carries in its metadata `authorization: Bearer <service identity>` (shared/identity.py, kind `service`),
`x-request-id` and, when sampled, `traceparent`. An error travels whole in the trailing metadata (shared/errors.py),
so that the caller raises what the callee raised. What cannot be mapped becomes Unavailable, Timeout or Internal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc import aio
from opentelemetry.trace import SpanKind

from shared import errors
from shared.errors import Internal, PermissionDenied, Timeout, TollgateError, Unavailable
from shared.identity import Identity, IdentityRing
from shared.telemetry import GrpcMetrics, get_logger, inject_trace, span

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
CONCURRENT_CALLS_MAX = 2_000
KEEPALIVE_MS = 20_000
TOKEN_REFRESH_S = 30
DEFAULT_TIMEOUT_S = 5.0
STREAM_LIFE_MAX_S = 600.0

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


if TYPE_CHECKING:  # generic in the stubs only
    _ServerInterceptor = aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = aio.ServerInterceptor


class ServerInterceptor(_ServerInterceptor):
    """Authenticates the caller, binds the log context, maps errors, counts: unary calls, and streams both ways.

    A stream is authenticated when it begins, and ended after STREAM_LIFE_MAX_S; its client opens another one.
    """

    def __init__(self, ring: IdentityRing, metrics: GrpcMetrics) -> None:
        self._ring = ring
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method

        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            return await self._call(handler.unary_unary, method, request, context)

        async def stream(requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
            await self._call(_limited(handler.stream_stream), method, requests, context)

        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)
        assert handler.stream_stream is not None, f"{method}: only unary calls and streams both ways are spoken here"
        return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)

    async def _call(self, inner: Any, method: str, request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        started, code = time.perf_counter(), "ok"
        with (
            structlog.contextvars.bound_contextvars(request_id=metadata.get("x-request-id", "")),
            span(method, SpanKind.SERVER, carrier=metadata, attributes={"rpc.system": "grpc"}),
        ):
            try:
                self._authenticate(metadata)
                return await inner(request, context)
            except TollgateError as e:
                code = e.code
                log.info("call_refused", method=method, code=e.code, detail=e.detail)
                await _abort(context, e)
            except (asyncio.CancelledError, aio.AbortError):
                code = "cancelled"
                raise
            except Exception as e:
                code = "internal_error"
                log.exception("call_failed", method=method)
                await _abort(context, Internal(detail=type(e).__name__))
            finally:
                self._metrics.observe(method.rsplit("/", 1)[-1], code, time.perf_counter() - started)

    def _authenticate(self, metadata: dict[str, str]) -> None:
        token = metadata.get("authorization", "").removeprefix("Bearer ")
        if self._ring.verify(token).kind != "service":
            raise PermissionDenied("Only services may call this.", code="service_identity_required")


def _limited(inner: Any) -> Callable[[Any, Any], Awaitable[None]]:
    async def serve(requests: Any, context: Any) -> None:
        try:
            async with asyncio.timeout(STREAM_LIFE_MAX_S):
                await inner(requests, context)
        except TimeoutError as e:
            raise Unavailable("This stream is old. Open another one.", code="stream_too_old") from e

    return serve


async def _abort(context: aio.ServicerContext[Any, Any], error: TollgateError) -> None:
    await context.abort(
        grpc.StatusCode[error.grpc_status],
        error.message,
        trailing_metadata=((errors.METADATA_KEY, errors.to_metadata(error)),),
    )


def create_server(ring: IdentityRing, metrics: GrpcMetrics) -> aio.Server:
    """A gRPC server; add servicers, then hand it to the runtime, which binds, starts and drains it."""
    return aio.server(
        interceptors=(ServerInterceptor(ring, metrics),),
        options=[*_OPTIONS, ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2)],
        maximum_concurrent_rpcs=CONCURRENT_CALLS_MAX,
    )


class Caller:
    """One channel to another service, and the only way to call through it.

    `call` adds the service token, request id and trace, and raises the callee's own error. Every call has a
    deadline. The channel reconnects by itself; a call on a broken one fails at once with Unavailable.
    """

    def __init__(self, target: str, ring: IdentityRing, *, service: str) -> None:
        self.channel = aio.insecure_channel(
            target,
            options=[*_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)],
        )
        self._ring = ring
        self._service = service
        self._token = ""
        self._token_made_s = float("-inf")

    async def call(self, method: Any, request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """Call a stub's unary method. Raises TollgateError, and only that, but for cancellation."""
        context = structlog.contextvars.get_contextvars()
        headers = {"authorization": f"Bearer {self._fresh_token()}", "x-request-id": context.get("request_id", "")}
        inject_trace(headers)
        try:
            return await method(request, timeout=timeout_s, metadata=tuple(headers.items()))
        except aio.AioRpcError as e:
            raise mapped(e) from e

    def stream(self, method: Any) -> Any:
        """Begin a stub's stream both ways, without a deadline; what it raises is for `mapped`."""
        return method(metadata=(("authorization", f"Bearer {self._fresh_token()}"),))

    async def close(self) -> None:
        await self.channel.close(None)

    def _fresh_token(self) -> str:
        now = time.monotonic()
        if now - self._token_made_s > TOKEN_REFRESH_S:
            self._token = self._ring.sign(Identity(kind="service", service=self._service))
            self._token_made_s = now
        return self._token


def mapped(error: aio.AioRpcError) -> TollgateError:
    """The callee's own error, or what the connection's failure comes to."""
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == errors.METADATA_KEY and isinstance(value, bytes):
            return errors.from_metadata(value)
    detail = f"{error.code().name}: {error.details()}"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Timeout(detail=detail)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED):
        return Unavailable(detail=detail, retry_after_s=1)
    return Internal(detail=detail)
