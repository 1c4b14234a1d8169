"""The bare engine, for comparison: xllamacpp in process, no Triton, no service. Runs in Triton's environment.

    .venv-triton/bin/python -m bench.engine <build's folder> <its config.pbtxt's parameters as JSON> <key> < jobs

The engine is made by the backend's own code from the build's own configuration, so that threads, slots, context,
batches and caches are the same by construction. Prints the address of llama.cpp's own HTTP server, which the same
engine serves to who has the key. Then reads {"bodies": ["…", …], "concurrency": n} lines from standard input and
answers each with one JSON line of results {"ttft_s", "duration_s", "output_tokens"} per body and the wall time of all.
"""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

from services.inference.backend.config import BackendConfig
from services.inference.backend.llamacpp import engine_parameters

HTTP_THREADS = 24  # the HTTP server's own; the backend needs few
_COMPLETION = re.compile(r'"completion_tokens":(\d+)')


def start(folder: Path, parameters: dict[str, str], key: str) -> Any:
    """The engine as the backend starts it, but for the threads of the HTTP side."""
    config = BackendConfig.parse(folder.name, folder / "1", parameters)
    engine = engine_parameters(config, key)
    engine.n_threads_http = HTTP_THREADS
    return xllamacpp.Server(engine)


def generate(server: Any, body: str) -> dict[str, float]:
    """One streamed completion."""
    started_s = time.perf_counter()
    first_s = 0.0
    last = ""

    def take(chunk: str | bytes) -> bool:
        nonlocal first_s, last
        text = chunk.decode() if isinstance(chunk, bytes) else chunk
        if not first_s and '"content":"' in text.replace('"content":""', ""):
            first_s = time.perf_counter() - started_s
        if '"usage":{' in text:
            last = text
        return False

    server.handle_chat_completions(body, take)
    counts = _COMPLETION.findall(last)
    duration_s = time.perf_counter() - started_s
    return {"ttft_s": first_s, "duration_s": duration_s, "output_tokens": int(counts[-1]) if counts else 0}


def say(line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    folder, parameters, key = sys.argv[1:]
    server = start(Path(folder), json.loads(parameters), key)
    say({"address": server.listening_address})
    for line in sys.stdin:
        job = json.loads(line)
        started_s = time.perf_counter()
        with ThreadPoolExecutor(job["concurrency"]) as pool:
            results = list(pool.map(lambda body: generate(server, body), job["bodies"]))
        say({"results": results, "wall_s": time.perf_counter() - started_s})


if __name__ == "__main__":
    main()
