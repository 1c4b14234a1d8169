"""The load: keeps connections busy with one request, and says what came back.

    python -m bench.edge.load '{"urls": […], "headers": {…}, "mode": "saturate", "connections": 32, "seconds": 5}'

Modes: `saturate`, every connection asks again as soon as it has its answer; `paced`, `rate` requests a second, one
connection each in turn; `stream`, every connection takes streams of `chunks` events, `gap_ms` apart. Prints JSON:
answers, other statuses, events, seconds, latencies (ms, of `paced`).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
QUESTION = "Say something short about toll gates, please."
LENGTHS = 8


@dataclass
class Tally:
    """What came back."""

    answers: int = 0
    others: dict[str, int] = field(default_factory=dict)
    events: int = 0
    latencies_ms: list[float] = field(default_factory=list)


class Asker(asyncio.Protocol):
    """One connection."""

    def __init__(self, requests: Sequence[bytes], tally: Tally, *, is_endless: bool) -> None:
        self._requests = cycle(requests)
        self._tally = tally
        self._is_endless = is_endless
        self._buffer = b""
        self._asked_s = 0.0
        self.is_idle = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        """Send the request."""
        self.is_idle = False
        self._asked_s = time.perf_counter()
        self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._tally.events += data.count(b"data: {")
        self._buffer = self._buffer + data if self._buffer else data
        head, mark, body = self._buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        length = LENGTH.search(head)
        is_complete = len(body) >= int(length.group(1)) if length else body.endswith(b"0\r\n\r\n")
        if not is_complete:
            if length is None:
                self._buffer = head + mark + body[-16:]  # only its end matters
            return
        self._done(head)

    def _done(self, head: bytes) -> None:
        self._buffer = b""
        status = head[9:12]
        if status == b"200":
            self._tally.answers += 1
        else:
            self._tally.others[status.decode()] = self._tally.others.get(status.decode(), 0) + 1
        self._tally.latencies_ms.append((time.perf_counter() - self._asked_s) * 1000)
        self.is_idle = True
        if self._is_endless:
            self.ask()


def requests(job: Mapping[str, Any], url: str) -> list[bytes]:
    """Requests of different lengths: small chat completions."""
    if job["mode"] == "stream":
        return [request(job, url, f"{job['chunks']},{job['gap_ms']}")]
    return [request(job, url, " ".join([QUESTION] * times)) for times in range(1, LENGTHS + 1)]


def request(job: Mapping[str, Any], url: str, content: str) -> bytes:
    """The bytes of one."""
    parts = urlsplit(url)
    body: dict[str, Any] = {"model": "bench", "messages": [{"role": "user", "content": content}], "max_tokens": 16}
    if job["mode"] == "stream":
        body["stream"] = True
    data = json.dumps(body).encode()
    headers = {
        "host": parts.netloc,
        "accept": "application/json",
        "content-type": "application/json",
        "user-agent": "bench",
        **job["headers"],
        "content-length": str(len(data)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {parts.path} HTTP/1.1\r\n{lines}\r\n".encode() + data


async def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job."""
    tally, loop = Tally(), asyncio.get_running_loop()
    is_paced = job["mode"] == "paced"
    askers = []
    for url in islice(cycle(job["urls"]), job["connections"]):
        parts = urlsplit(url)
        _, asker = await loop.create_connection(
            partial(Asker, requests(job, url), tally, is_endless=not is_paced), parts.hostname, parts.port
        )
        askers.append(asker)
    began_s = time.perf_counter()
    if is_paced:
        for i in range(int(job["seconds"] * job["rate"])):
            await asyncio.sleep(max(0.0, began_s + i / job["rate"] - time.perf_counter()))
            if (free := next((a for a in askers if a.is_idle), None)) is not None:
                free.ask()
        await asyncio.sleep(0.2)
    else:
        for asker in askers:
            asker.ask()
        await asyncio.sleep(job["seconds"])
    seconds = time.perf_counter() - began_s
    for asker in askers:
        asker.transport.abort()
    latencies = sorted(tally.latencies_ms) if is_paced else []
    return {
        "answers": tally.answers,
        "others": tally.others,
        "events": tally.events,
        "seconds": seconds,
        "latencies_ms": latencies,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(json.loads(sys.argv[1])))))
