"""make bench-leaving: from a client's hang-up to a free slot of the engine.

One request at a time on chat-mini, through the whole path; its client closes the connection, and the build is asked
every POLL_S whether it is at work. So a figure holds all of it: gateway and chat notice, the engine is told, its worker
ends the request. Four moments: during the prompt, at the first token, later in the stream, and without a stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench import models, report, stack
from bench.serving import NEVER
from services.inference.backend.gguf import read_head

SAMPLES = 100
BUILD = "chat-mini-q8_0"
BOUND_S = 0.2
POLL_S = 0.002
TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 4_000
MAX_TOKENS = 400  # beside the longest prompt in the context
PROMPT_WORDS = 80  # about half of the context
LONG = "Recite the whole manual."
END = int(read_head(models.CHAT_MINI / "1/model.gguf").metadata["tokenizer.ggml.eos_token_id"])
LENGTH_PREFIX = struct.Struct("<I")


@dataclass(frozen=True)
class Moment:
    """When to hang up: after so many chunks with content, or `after_s` into the engine's work."""

    name: str
    stream: bool
    chunks: int
    prompt_words: int = 0

    def body(self, number: int) -> bytes:
        """Prompts differ, so that no cache shortens them."""
        words = " ".join(f"w{number}x{i}" for i in range(self.prompt_words))
        message = {"role": "user", "content": f"{words} {LONG}".strip()}
        wanted = {"model": "chat-mini", "stream": self.stream, "max_tokens": MAX_TOKENS, "messages": [message]}
        wanted["logit_bias"] = {str(END): NEVER}  # nobody leaves an answer that has ended
        return json.dumps(wanted).encode()


MOMENTS = (
    Moment("during the prompt", stream=True, chunks=0, prompt_words=PROMPT_WORDS),
    Moment("at the first token", stream=True, chunks=1),
    Moment("in mid-stream", stream=True, chunks=5),
    Moment("without a stream", stream=False, chunks=0),
)


class Engine:
    """Asks the build itself what it does."""

    def __init__(self, target: str) -> None:
        self._channel = aio.insecure_channel(target)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def busy(self) -> bool:
        """Whether a slot is taken, or somebody waits."""
        content = json.dumps({"op": "status", "messages": [{"role": "user", "content": "x"}]}).encode()
        request = service_pb2.ModelInferRequest(model_name=BUILD)
        request.inputs.add(name="REQUEST", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(LENGTH_PREFIX.pack(len(content)) + content)
        status: dict[str, Any] = {}
        async for reply in self._stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
            if reply.infer_response.raw_output_contents:
                status = json.loads(reply.infer_response.raw_output_contents[0][LENGTH_PREFIX.size :])
        return bool(status["slots_busy"] or status["queue_depth"])

    async def until(self, busy: bool) -> None:
        """Wait until it is at work, or free."""
        async with asyncio.timeout(TIMEOUT_S):
            while await self.busy() != busy:
                await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        await self._channel.close(None)


async def hang_up(url: str, key: str, engine: Engine, moment: Moment, number: int) -> float:
    """One request that is left; seconds until the engine was free."""
    address, body = urlsplit(url), moment.body(number)
    await engine.until(busy=False)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    if moment.chunks:
        for _ in range(moment.chunks + 1):  # the first carries the role
            await reader.readuntil(b'"content":"')
    else:
        try:
            await engine.until(busy=True)
        except TimeoutError:
            raise RuntimeError(f"not at work: {(await reader.read(ANSWER_BYTES_MAX)).decode()}") from None
    writer.close()
    began_s = time.perf_counter()
    await engine.until(busy=False)
    return time.perf_counter() - began_s


def unlimit(variables: dict[str, str]) -> str:
    """A key of a new user whom no limit stops."""
    url = variables["TOLLGATE_URL"]
    name, password = f"leaver{random.randrange(10**6)}", "correct horse battery staple"
    limits = {"minute": 100_000, "hour": 100_000, "day": 100_000}
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        account = {"username": name, "email": f"{name}@example.com", "password": password}
        known = {"username": name, "password": password}
        http.post("/api/v1/auth/register", json=account).raise_for_status()
        token = http.post("/api/v1/auth/login", json=known).raise_for_status().json()["access_token"]
        signed_in = {"Authorization": f"Bearer {token}"}
        made = http.post("/api/v1/keys", json={"name": "leaver"}, headers=signed_in).raise_for_status().json()
        http.post(
            f"/api/v1/admin/auth/keys/{made['id']}/limits",
            json={"limits": limits},
            headers={"Authorization": f"Bearer {variables['TOLLGATE_ADMIN_TOKEN']}"},
        ).raise_for_status()
    return str(made["key"])


async def measure(variables: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each moment."""
    engine, key, rows = Engine(variables["TRITON_GRPC_URL"]), unlimit(variables), []
    for moment in MOMENTS:
        print(f"left {moment.name}: {SAMPLES} requests", file=sys.stderr, flush=True)
        taken_s = [await hang_up(variables["TOLLGATE_URL"], key, engine, moment, number) for number in range(SAMPLES)]
        rows.append(
            {
                "left": moment.name,
                "samples": SAMPLES,
                "p50_ms": report.percentile(taken_s, 0.5) * 1000,
                "p99_ms": report.percentile(taken_s, 0.99) * 1000,
                "max_ms": max(taken_s) * 1000,
            }
        )
    await engine.close()
    return rows


def main() -> None:
    with stack.running() as variables:
        rows = asyncio.run(measure(variables))
    bound_ms = BOUND_S * 1000
    aims = [
        report.aim(
            f"a slot is free, left {row['left']}: p99, ms", row["p99_ms"], f"<= {bound_ms:g}", row["p99_ms"] <= bound_ms
        )
        for row in rows
    ]
    report.write("leaving", rows, aims)


if __name__ == "__main__":
    main()
