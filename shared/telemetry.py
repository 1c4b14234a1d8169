"""Logs, metrics and traces. Every metric's name and labels stand here and nowhere else.

Logs are JSON lines on stdout with `request_id`, `trace_id` and `span_id` bound per request; never prompts, never
secrets. Metrics are classes over a registry that `app.py` makes, so that nothing happens on import. Spans go to
OTEL_EXPORTER_OTLP_ENDPOINT when that is set; otherwise the API's no-op tracer costs next to nothing.
GenAI attribute names are constants here, since their conventions are still in development.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO

import structlog
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from shared.tallies import Count, PlainCounter, PlainHistogram, Spread

GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures (memory, descriptors, garbage collection)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class HttpMetrics:
    """RED of every HTTP server of ours. `route` is the template, never the raw path, so that labels are bounded."""

    def __init__(self, registry: CollectorRegistry, service: str) -> None:
        self.requests = PlainCounter(
            "tollgate_http_requests_total",
            "Requests answered.",
            ["service", "method", "route", "status"],
            registry=registry,
        )
        self.duration_s = PlainHistogram(
            "tollgate_http_request_duration_seconds",
            "From the first byte of the request to the last of the response.",
            ["service", "method", "route"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "tollgate_http_requests_in_flight", "Requests being answered.", ["service"], registry=registry
        ).labels(service)
        self._service = service
        self._series: dict[tuple[str, str, int], tuple[Count, Spread]] = {}

    def observe(self, method: str, route: str, status: int, duration_s: float) -> None:
        if (series := self._series.get((method, route, status))) is None:
            names = self._service, method, route
            series = self.requests.labels(*names, str(status)), self.duration_s.labels(*names)
            self._series[method, route, status] = series
        series[0].value += 1
        series[1].observe(duration_s)


class GrpcMetrics:
    """RED of every gRPC server of ours."""

    def __init__(self, registry: CollectorRegistry, service: str) -> None:
        self._service = service
        self.handled = Counter(
            "tollgate_grpc_requests_total",
            "gRPC calls answered; code is `ok` or the error's code.",
            ["service", "method", "code"],
            registry=registry,
        )
        self.duration_s = Histogram(
            "tollgate_grpc_request_duration_seconds",
            "Time to answer a gRPC call.",
            ["service", "method"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )

    def observe(self, method: str, code: str, duration_s: float) -> None:
        self.handled.labels(self._service, method, code).inc()
        self.duration_s.labels(self._service, method).observe(duration_s)


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.admissions = PlainCounter(
            "tollgate_gateway_admissions_total",
            "Admission decisions: admitted, or the error code of the refusal.",
            ["decision"],
            registry=registry,
        )
        self.key_lookups = PlainCounter(
            "tollgate_gateway_key_lookups_total",
            "Where API keys were found: process, redis, postgres, negative, junk.",
            ["source"],
            registry=registry,
        )
        self.limiter_duration_s = PlainHistogram(
            "tollgate_gateway_limiter_duration_seconds",
            "The admission call to Redis.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        ).labels()
        self.redis_up = Gauge("tollgate_gateway_redis_up", "1 while Redis answers in time.", registry=registry)
        self.upstream_errors = Counter(
            "tollgate_gateway_upstream_errors_total",
            "Requests that a service did not answer properly.",
            ["upstream", "code"],
            registry=registry,
        )
        self.usage_events_lost = Counter(
            "tollgate_gateway_usage_events_lost_total",
            "Usage events dropped because the queue was full or Redis was away.",
            registry=registry,
        )


class ChatMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["model", "build"]
        self.requests = Counter(
            "tollgate_chat_requests_total",
            "Completions by outcome: the finish_reason, `cancelled`, or the error's code.",
            [*labels, "outcome"],
            registry=registry,
        )
        self.ttft_s = Histogram(
            "tollgate_chat_time_to_first_token_seconds",
            "From the parsed request to the first token.",
            labels,
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.token_s = Histogram(
            "tollgate_chat_time_per_output_token_seconds",
            "Mean time per output token of one request, after the first.",
            labels,
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "tollgate_chat_tokens_total",
            "Tokens by kind: input, cached, output.",
            [*labels, "kind"],
            registry=registry,
        )
        self.streams = Gauge("tollgate_chat_streams", "Generations in flight.", registry=registry)
        self.flag_decisions = Counter(
            "tollgate_chat_flag_decisions_total",
            "Which build the flags chose, and why.",
            [*labels, "reason"],
            registry=registry,
        )
        self.flags_age_s = Gauge(
            "tollgate_chat_flags_age_seconds", "Since the last successful look at Unleash.", registry=registry
        )
        self.resolution_failures = Counter(
            "tollgate_chat_hold_resolution_failures_total",
            "Holds that could not be settled or voided; billing's sweeper settles them by their last heartbeat.",
            registry=registry,
        )


class BillingMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.operations = Counter(
            "tollgate_billing_operations_total",
            "Ledger operations by result: applied, replayed, or the refusal's code.",
            ["kind", "result"],
            registry=registry,
        )
        self.credits_settled = Counter(
            "tollgate_billing_credits_settled_total",
            "Credits (not nano-credits) posted by settlements.",
            ["model", "build"],
            registry=registry,
        )
        self.credits_held = Gauge("tollgate_billing_credits_held", "Credits in open holds.", registry=registry)
        self.open_holds = Gauge("tollgate_billing_open_holds", "Holds not resolved yet.", registry=registry)
        self.holds_expired = Counter(
            "tollgate_billing_holds_expired_total", "Holds that the sweeper settled.", registry=registry
        )
        self.wallets_frozen = Gauge("tollgate_billing_wallets_frozen", "Wallets frozen.", registry=registry)
        self.topups = Counter(
            "tollgate_billing_topups_total",
            "Top-ups by what became of them: paid, failed, mismatch (another amount or currency was paid).",
            ["provider", "outcome"],
            registry=registry,
        )
        self.webhooks = Counter(
            "tollgate_billing_webhook_attempts_total",
            "Attempts to deliver a webhook: delivered, pending (to be tried again), failed (given up).",
            ["outcome"],
            registry=registry,
        )
        self.discrepancies = Counter(
            "tollgate_billing_discrepancies_total",
            "Differences that the reconciler found, by check; each freezes its wallet.",
            ["check"],
            registry=registry,
        )
        self.reconciled = Counter(
            "tollgate_billing_reconciled_total", "What the reconciler has examined.", ["what"], registry=registry
        )
        self.reconciliation_cycle = Gauge(
            "tollgate_billing_reconciliation_cycle_seconds",
            "How long the last walk from end to end took.",
            ["walk"],
            registry=registry,
        )
        self.partition_horizon = Gauge(
            "tollgate_billing_partition_horizon_seconds", "Until the last partition's end.", registry=registry
        )
        self.partition_strays = Gauge(
            "tollgate_billing_partition_strays", "Rows in default partitions, at most 10,000 each.", registry=registry
        )


class AuthMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.logins = Counter(
            "tollgate_auth_logins_total",
            "Sign-ins by result: ok or the error's code.",
            ["result"],
            registry=registry,
        )
        self.keys = Counter(
            "tollgate_auth_key_events_total",
            "API keys created, rotated, revoked.",
            ["event"],
            registry=registry,
        )
        self.outbox_pending = Gauge(
            "tollgate_auth_outbox_pending", "Key events not yet delivered to Redis.", registry=registry
        )
        self.emails = Counter(
            "tollgate_auth_emails_total",
            "E-mails by result: sent, retried, given_up, dropped (nobody should get one).",
            ["result"],
            registry=registry,
        )
        self.password_jobs = Gauge(
            "tollgate_auth_password_jobs", "Password hashes being computed or waiting for a thread.", registry=registry
        )


class InferenceMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.build_ready = Gauge(
            "tollgate_inference_build_ready",
            "1 while a build answers its canary.",
            ["model", "build"],
            registry=registry,
        )
        self.load_failures = Counter(
            "tollgate_inference_load_failures_total", "Loads that failed.", ["build"], registry=registry
        )
        self.recoveries = Counter(
            "tollgate_inference_recoveries_total",
            "Builds reloaded after their process or server died.",
            ["build"],
            registry=registry,
        )
        self.canary_s = Histogram(
            "tollgate_inference_canary_seconds", "The canary's answer time.", ["build"], registry=registry
        )


def configure_logging(service: str, level: str, stream: TextIO | None = None) -> None:
    """JSON lines on `stream` (stdout) for structlog and for the standard library's loggers alike."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_trace,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
        _service_adder(service),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in (
        "uvicorn.access",
        "httpx",
        "httpcore",
        "apscheduler",
        "UnleashClient",
        "aiosqlite",
        "alembic",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for own in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(own).handlers[:] = []
        logging.getLogger(own).propagate = True


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; `name` is the module's `__name__`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def configure_tracing(service: str, endpoint: str | None) -> TracerProvider | None:
    """Export spans over OTLP/HTTP when an endpoint is given. Call the result's `shutdown` at the end."""
    if not endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": f"tollgate-{service}"}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider


@contextmanager
def span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    carrier: Mapping[str, str] | None = None,
    attributes: Mapping[str, str | int | float | bool] | None = None,
) -> Iterator[Span]:
    """A span around a block. `carrier` holds the caller's `traceparent`, if any."""
    parent = propagate.extract(dict(carrier)) if carrier is not None else None
    tracer = trace.get_tracer("tollgate")
    with tracer.start_as_current_span(
        name,
        context=parent,
        kind=kind,
        attributes=dict(attributes or {}),
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except Exception as e:
            current.set_status(Status(StatusCode.ERROR, type(e).__name__))
            raise


def inject_trace(carrier: MutableMapping[str, str]) -> None:
    """Add `traceparent` to outgoing headers or metadata when the present span is sampled."""
    if trace.get_current_span().get_span_context().trace_flags.sampled:
        propagate.inject(carrier)


def _add_trace(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format(context.trace_id, "032x")
        event["span_id"] = format(context.span_id, "016x")
    return event


def _service_adder(service: str) -> Any:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    return add
