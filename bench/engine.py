"""The bare engine, for comparison: xllamacpp in process, no Triton, no service. Runs in Triton's environment.

    .venv-triton/bin/python bench/engine.py <model.gguf> <slots> <context tokens> < jobs

Prints the address of llama.cpp's own HTTP server, which the same engine serves. Then reads {"bodies": [...],
"concurrency": n} lines from standard input and answers each with one JSON line of results {"ttft_s", "duration_s",
"output_tokens"} per body and the wall time of the whole round.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

HTTP_THREADS = 24


def start(path: str, slots: int, context_tokens: int) -> Any:
    """The engine with the same settings as the backend has (services/inference/backend/llamacpp.py)."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_parallel = slots
    parameters.n_ctx = context_tokens * slots
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.n_batch = parameters.n_ubatch = 64
    parameters.cache_ram_mib = 0
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_threads_http = HTTP_THREADS
    parameters.ui = False
    return xllamacpp.Server(parameters)


def generate(server: Any, body: dict[str, Any]) -> dict[str, float]:
    """One streamed completion."""
    started = time.perf_counter()
    first = 0.0
    tokens = 0

    def take(chunk: str | bytes) -> bool:
        nonlocal first, tokens
        text = chunk.decode() if isinstance(chunk, bytes) else chunk
        if not first and '"content":"' in text:
            first = time.perf_counter() - started
        if '"usage":{' in text:
            tokens = json.loads(text)["usage"]["completion_tokens"]
        return False

    server.handle_chat_completions(
        json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}), take
    )
    return {"ttft_s": first, "duration_s": time.perf_counter() - started, "output_tokens": tokens}


def say(line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    path, slots, context_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    server = start(path, slots, context_tokens)
    say({"address": server.listening_address})
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        with ThreadPoolExecutor(job["concurrency"]) as pool:
            results = list(pool.map(lambda body: generate(server, body), job["bodies"]))
        say({"results": results, "wall_s": time.perf_counter() - started})


if __name__ == "__main__":
    main()
