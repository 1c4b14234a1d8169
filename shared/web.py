"""The HTTP side that every service shares: one FastAPI application with the same edges everywhere.

`create_app` gives: /healthz (the process), /readyz (named checks), /metrics, a request id on every response, JSON
access log, RED metrics by route template, errors in the dialect of the path, a limit on bodies, and the caller's
identity from the gateway's signed header. Routes take the identity as a parameter: `identity: Caller`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from opentelemetry.trace import SpanKind
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import errors, ids
from shared.errors import InvalidRequest, PayloadTooLarge, TollgateError
from shared.identity import HEADER, Identity, IdentityRing
from shared.telemetry import HttpMetrics, get_logger, span

log = get_logger("access")

BODY_BYTES_MAX = 1024 * 1024
CHECK_TIMEOUT_S = 2.0
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; only logs and metrics see it
UNLOGGED = ("/healthz", "/readyz", "/metrics")

Check = Callable[[], Awaitable[None]]


class Readiness:
    """Named dependency checks behind /readyz. A check raises when its dependency cannot serve."""

    def __init__(self, checks: Mapping[str, Check] | None = None) -> None:
        self._checks = dict(checks or {})
        self.draining = False

    def add(self, name: str, check: Check) -> None:
        self._checks[name] = check

    async def report(self) -> tuple[bool, dict[str, str]]:
        """(ready, {name: "ok" | reason}). Every check has CHECK_TIMEOUT_S; all run at once."""
        names = list(self._checks)
        results = await asyncio.gather(*(self._run(self._checks[n]) for n in names))
        report = dict(zip(names, results, strict=True))
        if self.draining:
            report["process"] = "draining"
        return all(v == "ok" for v in report.values()), report

    @staticmethod
    async def _run(check: Check) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await check()
        except TimeoutError:
            return "timeout"
        except TollgateError as e:
            return e.code
        except Exception as e:  # noqa: BLE001 - whatever is wrong with a dependency, the report says so
            return type(e).__name__
        return "ok"


def create_app(
    service: str, *, ring: IdentityRing, registry: CollectorRegistry, readiness: Readiness, description: str = ""
) -> FastAPI:
    """The application; include routers in it, then hand it to the runtime."""
    app = FastAPI(
        title=f"Tollgate {service}",
        description=description,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name this service's internal address
        # _Edge has spans and metrics of its own; FastAPI's tell the query, where a sign-in's code and state stand.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.ring = ring
    app.add_exception_handler(TollgateError, _on_tollgate_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(_Edge, metrics=HttpMetrics(registry, service))
    _add_health(app, registry, readiness)
    return app


# Coroutines, though they wait for nothing: FastAPI sends a plain function to a thread, which costs more than it does.
async def caller(request: Request) -> Identity:
    """The identity that the gateway signed. Raises Unauthenticated without a valid header."""
    ring: IdentityRing = request.app.state.ring
    return ring.verify(request.headers.get(HEADER))


async def authenticated(request: Request) -> Identity:
    """As `caller`, and refuses the anonymous."""
    identity = await caller(request)
    if not identity.is_authenticated:
        raise errors.Unauthenticated()
    return identity


AnyCaller = Annotated[Identity, Depends(caller)]
Caller = Annotated[Identity, Depends(authenticated)]


def _add_health(app: FastAPI, registry: CollectorRegistry, readiness: Readiness) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        ready, checks = await readiness.report()
        return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _respond(request: Request, error: TollgateError) -> Response:
    status, headers, body = errors.render(error, path=request.url.path, request_id=request.state.request_id)
    if error.status >= 500 or error.detail:
        log.warning("request_failed", code=error.code, status=status, detail=error.detail, path=request.url.path)
    return Response(body, status, headers)


async def _on_tollgate_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TollgateError)
    return _respond(request, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(request, validation_error(error.errors()))


def validation_error(problems: Any) -> InvalidRequest:
    """The first of pydantic's problems as one sentence that names the field; never echoes the value."""
    first = next(iter(problems))
    place = [str(p) for p in first["loc"] if p not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, TollgateError):  # FastAPI wraps what reading the body raised
        return _respond(request, error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    cls = errors.BY_STATUS.get(error.status_code, errors.InvalidRequest if error.status_code < 500 else errors.Internal)
    return _respond(request, cls(headers=error.headers))


class _Edge:
    """Pure ASGI: request id, log context, span, metrics, body limit, and the last resort for what nobody caught."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id = ids.accepted_request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(scope, receive, send, request_id)
        started = time.perf_counter()
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            span(f"{scope['method']} {scope['path']}", SpanKind.SERVER, carrier=headers),
            self._metrics.in_flight.track_inprogress(),
        ):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except TollgateError as e:
                await exchange.fail(e)
            except ClientDisconnect:
                exchange.status = exchange.status or CLIENT_CLOSED_REQUEST
            except Exception:
                log.exception("request_crashed", path=scope["path"])
                await exchange.fail(errors.Internal())
            finally:
                self._finish(scope, exchange.status, time.perf_counter() - started)

    def _finish(self, scope: Scope, status: int, duration_s: float) -> None:
        route = scope.get("route")
        template = getattr(route, "path", "unmatched")
        self._metrics.observe(scope["method"], template, status, duration_s)
        if scope["path"] not in UNLOGGED:
            log.info(
                "request",
                endpoint=template,
                method=scope["method"],
                status_code=status,
                response_time_ms=round(duration_s * 1000, 2),
            )


class _Exchange:
    """One request and its response: remembers the status, stamps the id, stops bodies that grow too large."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._request_id = request_id
        self._body_bytes = 0
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._body_bytes += len(message.get("body", b""))
            if self._body_bytes > BODY_BYTES_MAX:
                raise PayloadTooLarge(f"The body is larger than {BODY_BYTES_MAX} bytes.")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(k, v) for k, v in message["headers"] if k != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self._request_id.encode())]}
        await self._send(message)

    async def fail(self, error: TollgateError) -> None:
        """Answer with an error, unless the response has begun: then the server closes the connection."""
        if self.status:
            return
        status, headers, body = errors.render(error, path=self._scope["path"], request_id=self._request_id)
        raw = [(k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})
