"""Measures one completion: span, time to first token, time per token, tokens, outcome."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

from opentelemetry.trace import SpanKind

from shared import telemetry
from shared.errors import TollgateError
from shared.metering import Usage
from shared.telemetry import ChatMetrics, get_logger, span

log = get_logger(__name__)

NO_BUILD = "none"


class Watch:
    """A context around the completion. Set `build` and `outcome` as they become known."""

    def __init__(self, metrics: ChatMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._began_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self.usage = Usage()
        self.build = NO_BUILD
        self.outcome: str | None = None

    def see(self, usage: Usage) -> None:
        """Take in the usage of all choices so far."""
        if usage.output_tokens:
            self._last_s = time.perf_counter()
            if not self._first_s:
                self._first_s = self._last_s
        self.usage = usage

    def __enter__(self) -> Watch:
        self._span_block = span(
            f"chat {self._model}", SpanKind.CLIENT, attributes={telemetry.GEN_AI_REQUEST_MODEL: self._model}
        )
        self._span = self._span_block.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = self._conclude(exc)
        labels, usage = (self._model, self.build), self.usage
        self._metrics.requests.labels(*labels, outcome).inc()
        if usage.output_tokens:
            self._metrics.ttft_s.labels(*labels).observe(self._first_s - self._began_s)
            for kind, count in (
                ("input", usage.input_tokens),
                ("cached", usage.cached_input_tokens),
                ("output", usage.output_tokens),
            ):
                self._metrics.tokens.labels(*labels, kind).inc(count)
        if usage.output_tokens > 1:
            per_token_s = (self._last_s - self._first_s) / (usage.output_tokens - 1)
            self._metrics.token_s.labels(*labels).observe(per_token_s)
        self._span.set_attributes(
            {
                telemetry.GEN_AI_RESPONSE_MODEL: self.build,
                telemetry.GEN_AI_INPUT_TOKENS: usage.input_tokens,
                telemetry.GEN_AI_OUTPUT_TOKENS: usage.output_tokens,
                telemetry.GEN_AI_FINISH_REASONS: outcome,
            }
        )
        self._span_block.__exit__(exc_type, exc, traceback)
        log.info(
            "completion",
            model=self._model,
            build=self.build,
            outcome=outcome,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            duration_ms=round((time.perf_counter() - self._began_s) * 1000, 1),
        )

    def _conclude(self, exc: BaseException | None) -> str:
        if isinstance(exc, TollgateError):
            return exc.code
        if isinstance(exc, asyncio.CancelledError | GeneratorExit):
            return "cancelled"
        if exc is not None or self.outcome is None:
            return "internal_error"
        return self.outcome
