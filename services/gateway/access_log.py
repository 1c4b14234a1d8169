"""The access log: one JSON line a request, in the fields that every service logs, written in batches.

A logging framework costs as much as the whole relay of a small request; this is `orjson` and one write per batch. At
most `buffer_ms` of lines are lost when the process is killed; none when it drains.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from typing import TextIO

import orjson

from services.gateway.exchange import Exchange


class AccessLog:
    """See the module. `close` writes what is left; register it where things are closed."""

    def __init__(
        self,
        service: str,
        *,
        sample: float = 1.0,
        buffer_ms: int = 100,
        lines_max: int = 1_000,
        out: TextIO | None = None,
    ) -> None:
        """`sample`: which share of the responses below 400 is noted; every other response is."""
        self._sample = sample
        self._due = 0.0
        self._service = service
        self._buffer_s = buffer_ms / 1000
        self._lines_max = lines_max
        self._out = out
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def write(self, exchange: Exchange, ended_at: datetime, duration_s: float) -> None:
        """Note an exchange that has ended, unless it went well and is not in the sample."""
        if self._sample < 1 and exchange.complete and exchange.status < 400:
            self._due += self._sample
            if self._due < 1:
                return
            self._due -= 1
        identity = exchange.identity
        line = {
            "timestamp": ended_at,
            "level": "info",
            "service": self._service,
            "logger": "access",
            "event": "request",
            "request_id": exchange.request_id,
            "endpoint": exchange.route,
            "method": exchange.method,
            "status_code": exchange.status,
            "response_time_ms": round(duration_s * 1000, 2),
            "complete": exchange.complete,
        }
        if identity is not None:
            line["user_id"] = identity.user_id
            line["org_id"] = identity.org_id
            line["key_id"] = identity.key_id
        if exchange.span is not None:
            context = exchange.span.get_span_context()
            line |= {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        self._lines.append(orjson.dumps(line))
        if len(self._lines) >= self._lines_max:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._buffer_s, self.flush)

    def flush(self) -> None:
        """Write what has gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            lines, self._lines = self._lines, []
            out = self._out or sys.stdout
            out.write(b"\n".join(lines).decode() + "\n")
            out.flush()
