"""make bench-serving: what a token costs on its way out.

The same greedy requests, in one run, by four paths: (engine) the bare engine in process, (http) llama.cpp's own HTTP
server on the same engine, (triton) our backend in Triton, (gateway) the whole path: key, limits, hold, flags, Triton,
settlement. With two models: chat-mini, which is so small that what is around the engine dominates, and one of 143
million weights, whose engine does. Tokens are the engine's own count; TTFT is to the first content; CPU is of the
processes behind the path, per token generated.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tritonclient.grpc.aio as triton

from bench import models, report, stack
from bench.processes import Cpu

QUESTIONS = (
    "Tell me about Tollgate in detail.",
    "Explain the life of a request.",
    "Write a long introduction to Tollgate.",
    "How do limits work?",
    "What happens to my credits when I hang up?",
    "How do I roll out a new build?",
)
REQUEST_TIMEOUT_S = 120
SETUP_TIMEOUT_S = 60
SETUP_RETRY_S = 0.5

Result = dict[str, float]
Generate = Callable[[dict[str, Any]], Awaitable[Result]]


@dataclass(frozen=True)
class Load:
    """A model and what is asked of it. `rounds`: concurrency → requests."""

    alias: str
    build: str
    max_tokens: int
    rounds: Mapping[int, int]

    def bodies(self, count: int) -> list[dict[str, Any]]:
        """`count` greedy requests of varied length."""
        return [
            {
                "model": self.alias,
                "messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            }
            for i in range(count)
        ]


LOADS = (
    Load("chat-mini", "chat-mini-q8_0", 128, {1: 16, 4: 48, 16: 96}),
    Load(models.BIG, models.BIG, 48, {1: 6, 4: 16, 16: 32}),
)


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


async def through_triton(client: Any, build: str, body: dict[str, Any]) -> Result:
    """One stream straight from Triton."""
    clocked = Clocked()
    request = triton.InferInput("REQUEST", [1], "BYTES")
    request.set_data_from_numpy(np.array([json.dumps(body).encode()], dtype=object))

    async def requests() -> Any:
        yield {"model_name": build, "inputs": [request], "enable_empty_final_response": True}

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


async def over_http(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Result:
    """One stream of OpenAI's API."""
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


async def drive(generate: Generate, concurrency: int, bodies: Sequence[dict[str, Any]]) -> tuple[list[Result], float]:
    """The requests, `concurrency` at a time: their results and the wall time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> Result:
        async with slots:
            return await generate(body)

    started = time.perf_counter()
    async with asyncio.timeout(REQUEST_TIMEOUT_S * len(bodies)):
        results = await asyncio.gather(*(one(body) for body in bodies))
    return list(results), time.perf_counter() - started


class BareEngine:
    """bench/engine.py as a process, and llama.cpp's HTTP server in it."""

    def __init__(self, weights: Path) -> None:
        """Returns when the model is loaded."""
        self._process = subprocess.Popen(
            [
                str(stack.ROOT / ".venv-triton/bin/python"),
                str(stack.ROOT / "bench/engine.py"),
                *(str(weights), str(models.SLOTS), str(models.CONTEXT_TOKENS)),
            ],
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

    def round(self, bodies: Sequence[dict[str, Any]], concurrency: int) -> tuple[list[Result], float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"bodies": bodies, "concurrency": concurrency}) + "\n")
        self._process.stdin.flush()
        row = self._read()
        return row["results"], row["wall_s"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


async def customer(url: str, admin_token: str) -> str:
    """The key of a new customer whom the operator lets ask more often than the plan does."""
    name, password = f"bench-{secrets.token_hex(6)}", secrets.token_urlsafe(18)
    limits = {"minute": 100_000, "hour": 100_000, "day": 1_000_000, "concurrency": 64}
    async with aiohttp.ClientSession(url) as session:
        account = {"username": name, "email": f"{name}@example.com", "password": password}
        await patiently(session, "/api/v1/auth/register", "", account)
        tokens = await patiently(session, "/api/v1/auth/login", "", {"username": name, "password": password})
        key = await patiently(session, "/api/v1/keys", tokens["access_token"], {"name": "bench"})
        await patiently(session, f"/api/v1/admin/auth/keys/{key['id']}/limits", admin_token, {"limits": limits})
    return str(key["key"])


async def patiently(session: aiohttp.ClientSession, path: str, token: str, body: Mapping[str, Any]) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Paths:
    """Where the requests go. `session` carries the customer's key."""

    gateway: str
    session: aiohttp.ClientSession
    client: Any
    state: Path

    async def measure(self, load: Load, weights: Path) -> list[dict[str, Any]]:
        """All rounds of one model, the four paths of one concurrency next to each other."""
        engine = await asyncio.to_thread(BareEngine, weights)
        # The engine's server closes a connection after some requests, without a word: each request has its own there.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as plain:
            served: dict[str, Generate] = {
                "http": lambda body: over_http(plain, engine.address, body),
                "triton": lambda body: through_triton(self.client, load.build, body),
                "gateway": lambda body: over_http(self.session, self.gateway, body),
            }
            await asyncio.to_thread(engine.round, load.bodies(4), 2)
            for generate in served.values():  # warm-up
                await drive(generate, 2, load.bodies(4))
            rows = []
            for concurrency, count in load.rounds.items():
                bodies = load.bodies(count)
                with Cpu.of(engine.pid) as cpu:
                    results, wall_s = await asyncio.to_thread(engine.round, bodies, concurrency)
                rows.append(figures(load, "engine", concurrency, results, wall_s, cpu))
                for name, generate in served.items():
                    with Cpu.of(engine.pid) if name == "http" else Cpu.of_stack(self.state) as cpu:
                        results, wall_s = await drive(generate, concurrency, bodies)
                    rows.append(figures(load, name, concurrency, results, wall_s, cpu))
                print(f"{load.alias}: concurrency {concurrency} done", file=sys.stderr)
        engine.close()
        return rows


async def measure(environment: Mapping[str, str], repository: Path) -> list[dict[str, Any]]:
    """Every model by every path."""
    url = environment["TOLLGATE_URL"]
    headers = {"Authorization": f"Bearer {await customer(url, environment['TOLLGATE_ADMIN_TOKEN'])}"}
    client = triton.InferenceServerClient(environment["TRITON_GRPC_URL"].removeprefix("grpc://"))
    rows: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        paths = Paths(url, session, client, Path(environment["TOLLGATE_STATE"]))
        for load in LOADS:
            rows += await paths.measure(load, repository / load.build / "1/model.gguf")
    await client.close()
    return rows


def figures(
    load: Load, path: str, concurrency: int, results: Sequence[Result], wall_s: float, cpu: Cpu
) -> dict[str, Any]:
    """One row of the table."""
    tokens = sum(r["output_tokens"] for r in results)
    spread = [(r["duration_s"] - r["ttft_s"]) / max(1, r["output_tokens"] - 1) for r in results]
    per_token_us = {name: round(seconds / tokens * 1e6, 1) for name, seconds in cpu.seconds.items()}
    return {
        "model": load.alias,
        "path": path,
        "at": concurrency,
        "ttft_p50_ms": report.percentile([r["ttft_s"] for r in results], 0.5) * 1000,
        "ttft_p99_ms": report.percentile([r["ttft_s"] for r in results], 0.99) * 1000,
        "per_token_p50_ms": report.percentile(spread, 0.5) * 1000,
        "tokens": int(tokens),
        "tokens_per_s": tokens / wall_s,
        "cpu_us_per_token": sum(per_token_us.values()),
        "of_it": per_token_us,
    }


def aims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the whole path should stand beside the bare engine and llama.cpp's own server."""
    found = []
    for load in LOADS:
        for concurrency in load.rounds:
            by_path = {r["path"]: r for r in rows if r["model"] == load.alias and r["at"] == concurrency}
            other, least = ("engine", 0.95) if load.alias == models.BIG else ("http", 0.6)
            ratio = by_path["gateway"]["tokens_per_s"] / by_path[other]["tokens_per_s"]
            name = f"{load.alias} at {concurrency}: whole path / {other}, tokens/s"
            found.append(report.aim(name, ratio, f">= {least}", met=ratio >= least))
            if load.alias == models.BIG:
                more_ms = by_path["gateway"]["ttft_p50_ms"] - by_path["engine"]["ttft_p50_ms"]
                name = f"{load.alias} at {concurrency}: TTFT p50 over the bare engine's, ms"
                found.append(report.aim(name, more_ms, "<= 10", met=more_ms <= 10))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-models-") as folder:
        repository = Path(folder) / "models"
        models.repository(repository)
        with stack.running(TOLLGATE_MODEL_REPOSITORY=str(repository)) as environment:
            rows = asyncio.run(measure(environment, repository))
    report.write("serving", rows, aims(rows))


if __name__ == "__main__":
    main()
