"""One greedy stream by each path of bench-serving, timed; a path's own client does as little as it can.

A chunk costs the load generator a search for bytes, not a JSON document: it runs on the same processors as what it
measures. Only the first content and the last usage are looked at.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from grpc import aio
from tritonclient.grpc import service_pb2

from bench import stack
from services.inference.triton import parameters_in

REQUEST_TIMEOUT_S = 120
SETUP_TIMEOUT_S = 60
SETUP_RETRY_S = 0.5
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

PIECE_BYTES_MAX = 64 * 1024

_HEAD_END, _LAST_CHUNK = b"\r\n\r\n", b"\r\n0\r\n\r\n"
_CONTENT = b'"content":"'
_NO_CONTENT = b'"content":""'
_COMPLETION = re.compile(rb'"completion_tokens":(\d+)')

Body = Mapping[str, Any]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Result = dict[str, float]
Round = tuple[list[Result], float]
"""The results of some requests, and the wall time of all of them in seconds."""
Drive = Callable[[Sequence[Body], int], Awaitable[Round]]
"""Sends the bodies, so many at a time."""


async def timed(pieces: AsyncIterator[bytes]) -> Result:
    """Read a stream to its end: time to the first and to the last content, to the end, and the tokens by the engine's
    own count.
    """
    started_s = time.perf_counter()
    first_s = spoken_s = 0.0
    last = b""
    async for piece in pieces:
        if first_s:
            if _CONTENT in piece:
                spoken_s = time.perf_counter() - started_s
        elif _CONTENT in piece.replace(_NO_CONTENT, b""):
            first_s = spoken_s = time.perf_counter() - started_s
        if b'"usage":{' in piece:
            last = piece
        elif b'"error":{' in piece:
            raise RuntimeError(piece.decode(errors="replace"))
    duration_s = time.perf_counter() - started_s
    counts = _COMPLETION.findall(last)
    output_tokens = int(counts[-1]) if counts else 0
    return {"ttft_s": first_s, "spoken_s": spoken_s, "duration_s": duration_s, "output_tokens": output_tokens}


async def drive(pieces: Callable[[Body], AsyncIterator[bytes]], bodies: Sequence[Body], concurrency: int) -> Round:
    """The requests, `concurrency` at a time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(body: Body) -> Result:
        async with slots:
            return await timed(pieces(body))

    started_s = time.perf_counter()
    async with asyncio.timeout(REQUEST_TIMEOUT_S * len(bodies)):
        results = await asyncio.gather(*(one(body) for body in bodies))
    return list(results), time.perf_counter() - started_s


class Http:
    """A server of OpenAI's API. `key` is the customer's. Close it.

    HTTP of its own, since a client library's costs as much as a server's: the answer's bytes as they come, chunks'
    framing and all.
    """

    def __init__(self, url: str, key: str, *, keeps_alive: bool) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._keeps_alive = keeps_alive
        self._head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
            f"Connection: {'keep-alive' if keeps_alive else 'close'}\r\nContent-Type: application/json\r\n"
        ).encode()
        self._idle: list[Connection] = []

    async def drive(self, bodies: Sequence[Body], concurrency: int) -> Round:
        return await drive(self._pieces, bodies, concurrency)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()

    async def _pieces(self, body: Body) -> AsyncIterator[bytes]:
        content = json.dumps({**body, **STREAM}).encode()
        reader, writer = await self._connection()
        writer.write(b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(content), content))
        head = await reader.readuntil(_HEAD_END)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError((head + await reader.read(PIECE_BYTES_MAX)).decode(errors="replace"))
        last = b""
        while not last.endswith(_LAST_CHUNK):
            piece = await reader.read(PIECE_BYTES_MAX)
            if not piece:
                raise RuntimeError(f"the connection ended after {last!r}")
            yield piece
            last = (last + piece)[-len(_LAST_CHUNK) :]
        if self._keeps_alive:
            self._idle.append((reader, writer))
        else:
            writer.close()

    async def _connection(self) -> Connection:
        """One that the server has not given up meanwhile."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)


class Triton:
    """A build straight from Triton, without tritonclient's arrays, for that tenant. Close it."""

    def __init__(self, url: str, build: str, tenant: str) -> None:
        self._build = build
        self._tenant = tenant
        self._channel = aio.insecure_channel(url.removeprefix("grpc://"))
        self._method = self._channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    async def drive(self, bodies: Sequence[Body], concurrency: int) -> Round:
        return await drive(self._pieces, bodies, concurrency)

    async def close(self) -> None:
        await self._channel.close(None)

    async def _pieces(self, body: Body) -> AsyncIterator[bytes]:
        content = json.dumps(body).encode()
        request = service_pb2.ModelInferRequest(model_name=self._build)
        request.inputs.add(name="REQUEST", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(content)) + content)
        request.parameters["tg_tenant"].string_param = self._tenant
        async for reply in self._method(request):
            if reply.error_message:
                raise RuntimeError(reply.error_message)
            if reply.infer_response.raw_output_contents:
                yield reply.infer_response.raw_output_contents[0]


class BareEngine:
    """bench/engine.py as a process with a build's own configuration, and llama.cpp's HTTP server in it."""

    def __init__(self, repository: Path, build: str) -> None:
        """Returns when the model is loaded."""
        folder = repository / build
        self.key = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [
                str(stack.ROOT / ".venv-triton/bin/python"),
                *("-m", "bench.engine", str(folder), json.dumps(parameters_in(folder / "config.pbtxt")), self.key),
            ],
            cwd=stack.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Linux shares a busy processor out by session: one of its own, as the stack has
        )
        self.address = str(self._read()["address"])

    @property
    def pid(self) -> int:
        return self._process.pid

    async def drive(self, bodies: Sequence[Body], concurrency: int) -> Round:
        return await asyncio.to_thread(self._drive, bodies, concurrency)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _drive(self, bodies: Sequence[Body], concurrency: int) -> Round:
        assert self._process.stdin is not None
        jobs = [json.dumps({**body, **STREAM}) for body in bodies]
        self._process.stdin.write(json.dumps({"bodies": jobs, "concurrency": concurrency}) + "\n")
        self._process.stdin.flush()
        row = self._read()
        return row["results"], row["wall_s"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


class Customer(NamedTuple):
    """Who asks: with which key, and as which tenant of the engine."""

    key: str
    tenant: str


async def customer(url: str, admin_token: str) -> Customer:
    """A new one, whom the operator lets ask more often than the plan does."""
    name, password = f"bench-{secrets.token_hex(6)}", secrets.token_urlsafe(18)
    limits = {"minute": 100_000, "hour": 100_000, "day": 1_000_000, "concurrency": 64}
    async with aiohttp.ClientSession(url) as session:
        account = {"username": name, "email": f"{name}@example.com", "password": password}
        registered = await _patiently(session, "/api/v1/auth/register", "", account)
        tokens = await _patiently(session, "/api/v1/auth/login", "", {"username": name, "password": password})
        key = await _patiently(session, "/api/v1/keys", tokens["access_token"], {"name": "bench"})
        await _patiently(session, f"/api/v1/admin/auth/keys/{key['id']}/limits", admin_token, {"limits": limits})
    return Customer(key["key"], registered["org_id"])


async def _patiently(session: aiohttp.ClientSession, path: str, token: str, body: Body) -> dict[str, Any]:
    """The answer to a POST; what is unavailable on a busy machine is asked again, for a while."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    deadline_s = time.monotonic() + SETUP_TIMEOUT_S
    while True:
        async with session.post(path, json=body, headers=headers) as answer:
            if answer.status != 503 or time.monotonic() > deadline_s:
                answer.raise_for_status()
                found: dict[str, Any] = await answer.json()
                return found
        await asyncio.sleep(SETUP_RETRY_S)
