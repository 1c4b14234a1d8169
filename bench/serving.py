"""make bench-serving: what a token costs on its way out.

The same greedy requests, in one run, against (a) the bare engine in process, (b) Triton with our backend, (c) the
whole path: gateway, key, limits, hold, flags, Triton, settlement. chat-mini is so small that what is around the
engine dominates: this is the worst case for us. Tokens are the engine's own count; TTFT is to the first content.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
import tritonclient.grpc.aio as triton

from bench import report, stack

BUILD = "chat-mini-q8_0"
SLOTS, CONTEXT_TOKENS = 4, 1024
ROUNDS = {1: 16, 4: 48, 16: 96}  # concurrency → requests
MAX_TOKENS = 128
QUESTIONS = (
    "Tell me about Tollgate in detail.",
    "Explain the life of a request.",
    "Write a long introduction to Tollgate.",
    "How do limits work?",
    "What happens to my credits when I hang up?",
    "How do I roll out a new build?",
)
REQUEST_TIMEOUT_S = 120

Result = dict[str, float]
Generate = Callable[[dict[str, Any]], Awaitable[Result]]


def bodies(count: int) -> list[dict[str, Any]]:
    """`count` greedy requests of varied length."""
    return [
        {
            "model": "chat-mini",
            "messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        for i in range(count)
    ]


class Clocked:
    """Times one stream: `saw(has_content, completion_tokens)` for each chunk."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_s = 0.0
        self._tokens = 0

    def saw(self, has_content: bool, completion_tokens: int) -> None:
        if has_content and not self._first_s:
            self._first_s = time.perf_counter() - self._started
        self._tokens = max(self._tokens, completion_tokens)

    def result(self) -> Result:
        duration_s = time.perf_counter() - self._started
        return {"ttft_s": self._first_s, "duration_s": duration_s, "output_tokens": self._tokens}


async def through_triton(client: Any, body: dict[str, Any]) -> Result:
    """One stream straight from Triton."""
    clocked = Clocked()
    request = triton.InferInput("REQUEST", [1], "BYTES")
    request.set_data_from_numpy(np.array([json.dumps(body).encode()], dtype=object))

    async def requests() -> Any:
        yield {"model_name": BUILD, "inputs": [request], "enable_empty_final_response": True}

    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise RuntimeError(str(error))
        response = result.get_response()
        if response.outputs:
            chunk = json.loads(result.as_numpy("RESPONSE").reshape(-1)[0])
            choices = chunk["choices"]
            has_content = bool(choices and choices[0]["delta"].get("content"))
            clocked.saw(has_content, chunk["usage"]["completion_tokens"])
        if response.parameters["triton_final_response"].bool_param:
            break
    return clocked.result()


async def through_gateway(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Result:
    """One stream as a customer gets it."""
    clocked = Clocked()
    options = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/v1/chat/completions", json=options) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"]))
                choices, usage = chunk["choices"], chunk.get("usage") or {}
                has_content = bool(choices and choices[0]["delta"].get("content"))
                clocked.saw(has_content, usage.get("completion_tokens", 0))
    return clocked.result()


async def drive(generate: Generate, concurrency: int, count: int) -> tuple[list[Result], float]:
    """`count` requests, `concurrency` at a time: their results and the wall time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> Result:
        async with slots:
            return await generate(body)

    started = time.perf_counter()
    async with asyncio.timeout(REQUEST_TIMEOUT_S * count):
        results = await asyncio.gather(*(one(body) for body in bodies(count)))
    return list(results), time.perf_counter() - started


def figures(path: str, concurrency: int, results: Sequence[Result], wall_s: float) -> dict[str, Any]:
    """One row of the table."""
    tokens = sum(r["output_tokens"] for r in results)
    spread = [(r["duration_s"] - r["ttft_s"]) / max(1, r["output_tokens"] - 1) for r in results]
    return {
        "path": path,
        "concurrency": concurrency,
        "requests": len(results),
        "ttft_p50_ms": report.percentile([r["ttft_s"] for r in results], 0.5) * 1000,
        "ttft_p99_ms": report.percentile([r["ttft_s"] for r in results], 0.99) * 1000,
        "per_token_p50_ms": report.percentile(spread, 0.5) * 1000,
        "tokens": int(tokens),
        "tokens_per_s": tokens / wall_s,
    }


class BareEngine:
    """bench/engine.py as a process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                str(stack.ROOT / ".venv-triton/bin/python"),
                str(stack.ROOT / "bench/engine.py"),
                str(stack.ROOT / f"triton_models/{BUILD}/1/model.gguf"),
                str(SLOTS),
                str(CONTEXT_TOKENS),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def round(self, concurrency: int, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"bodies": bodies(count), "concurrency": concurrency}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        row = json.loads(self._process.stdout.readline())
        return figures("engine", concurrency, row["results"], row["wall_s"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


async def customer(url: str, admin_token: str) -> str:
    """The key of a new customer whom the operator lets ask more often than the plan does."""
    name, password = f"bench-{secrets.token_hex(6)}", secrets.token_urlsafe(18)
    limits = {"minute": 100_000, "hour": 100_000, "day": 1_000_000, "concurrency": 64}
    async with aiohttp.ClientSession(url, raise_for_status=True) as session:
        account = {"username": name, "email": f"{name}@example.com", "password": password}
        await session.post("/api/v1/auth/register", json=account)
        async with session.post("/api/v1/auth/login", json={"username": name, "password": password}) as answer:
            tokens = await answer.json()
        headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        async with session.post("/api/v1/keys", json={"name": "bench"}, headers=headers) as answer:
            key = await answer.json()
        path = f"/api/v1/admin/auth/keys/{key['id']}/limits"
        await session.post(path, json={"limits": limits}, headers={"Authorization": f"Bearer {admin_token}"})
    return str(key["key"])


async def measure(environment: dict[str, str]) -> list[dict[str, Any]]:
    """All rounds, the three paths of one concurrency next to each other."""
    rows: list[dict[str, Any]] = []
    url = environment["TOLLGATE_URL"]
    headers = {"Authorization": f"Bearer {await customer(url, environment['TOLLGATE_ADMIN_TOKEN'])}"}
    engine = BareEngine()
    client = triton.InferenceServerClient(environment["TRITON_GRPC_URL"].removeprefix("grpc://"))
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        paths: dict[str, Generate] = {
            "triton": lambda body: through_triton(client, body),
            "gateway": lambda body: through_gateway(session, url, body),
        }
        for generate in paths.values():  # warm-up
            await drive(generate, 2, 4)
        engine.round(2, 4)
        for concurrency, count in ROUNDS.items():
            rows.append(await asyncio.to_thread(engine.round, concurrency, count))
            for name, generate in paths.items():
                rows.append(figures(name, concurrency, *await drive(generate, concurrency, count)))
            print(f"concurrency {concurrency} done", file=sys.stderr)
    await client.close()
    engine.close()
    return rows


def aims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the whole path should stand beside the bare engine."""
    found = []
    for concurrency in ROUNDS:
        by_path = {row["path"]: row for row in rows if row["concurrency"] == concurrency}
        ratio = by_path["gateway"]["tokens_per_s"] / by_path["engine"]["tokens_per_s"]
        found.append(
            report.aim(f"whole path / bare engine, tokens/s at {concurrency}", ratio, ">= 0.5", met=ratio >= 0.5)
        )
    return found


def main() -> None:
    with stack.running() as environment:
        rows = asyncio.run(measure(environment))
    report.write("serving", rows, aims(rows))


if __name__ == "__main__":
    main()
