"""Logs are JSON lines that carry the request and the trace; spans join what the caller began."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from shared import telemetry

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import logging, structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from shared import telemetry
telemetry.configure_logging("test", "info")
trace.set_tracer_provider(TracerProvider())
parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
with structlog.contextvars.bound_contextvars(request_id="req_1"), telemetry.span("s", carrier=parent):
    telemetry.get_logger("ours").info("happened", tokens=3)
    logging.getLogger("theirs").warning("said %s", "so")
    carrier = {}
    telemetry.inject_trace(carrier)
    print(carrier["traceparent"])
try:
    raise RuntimeError("inside")
except RuntimeError:
    telemetry.get_logger("ours").exception("broke")
telemetry.get_logger("ours").debug("not at this level")
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_our_loggers_and_the_standard_librarys_write_the_same_json(lines: list[str]) -> None:
    ours, theirs = json.loads(lines[0]), json.loads(lines[1])
    assert ours["event"] == "happened"
    assert ours["tokens"] == 3
    assert theirs["event"] == "said so"
    for entry in (ours, theirs):
        assert entry["service"] == "test"
        assert entry["request_id"] == "req_1"
        assert entry["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        assert {"timestamp", "level", "logger", "span_id"} <= set(entry)


def test_an_exception_stays_on_one_line_and_debug_is_off(lines: list[str]) -> None:
    broke = json.loads(lines[3])
    assert "RuntimeError: inside" in broke["exception"]
    assert len(lines) == 4


def test_the_trace_goes_on_to_the_next_service(lines: list[str]) -> None:
    version, trace_id, span_id, flags = lines[2].split("-")
    assert (version, trace_id, flags) == ("00", "0af7651916cd43dd8448eb211c80319c", "01")
    assert span_id != "b7ad6b7169203331"


def test_nothing_is_exported_and_nothing_is_sent_without_an_endpoint() -> None:
    assert telemetry.configure_tracing("test", None) is None
    carrier: dict[str, str] = {}
    with telemetry.span("s"):
        telemetry.inject_trace(carrier)
    assert carrier == {}


def test_an_endpoint_gives_a_provider_that_can_be_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[TracerProvider] = []
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", installed.append)
    provider = telemetry.configure_tracing("test", "http://127.0.0.1:1")
    assert provider is not None
    assert installed == [provider]
    provider.shutdown()


def test_metric_names_are_unique_and_prefixed() -> None:
    registry = telemetry.new_registry()
    telemetry.HttpMetrics(registry, "x")
    telemetry.GrpcMetrics(registry, "x")
    for family in (
        telemetry.GatewayMetrics,
        telemetry.ChatMetrics,
        telemetry.BillingMetrics,
        telemetry.AuthMetrics,
        telemetry.InferenceMetrics,
    ):
        family(registry)
    own = [m.name for m in registry.collect() if not m.name.startswith(("process_", "python_"))]
    assert own
    assert all(name.startswith("tollgate_") for name in own)
