"""Contenders that are not ours and come from outside: fetched by the bench, never a dependency.

nginx from PATH, else Debian's package, unpacked in a temporary place. sglang-router from its wheel, LiteLLM's proxy
with a database of its own, each in an environment under .tollgate/bench.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from bench.edge.contenders import CHAT, Contender, children, started, wait_for
from bench.edge.stores import LIMITS, Stores
from bench.stack import ROOT, free_port

ENVIRONMENTS = ROOT / ".tollgate" / "bench"


@contextmanager
def nginx_binary() -> Iterator[str]:
    """Where nginx is; "" where it cannot be had."""
    if found := shutil.which("nginx"):
        yield found
        return
    if shutil.which("apt-get") is None:
        print("nginx is neither installed nor to be had: not measured", file=sys.stderr)
        yield ""
        return
    directory = tempfile.mkdtemp(prefix="tollgate-bench-nginx-")
    Path(directory).chmod(0o755)
    try:
        subprocess.run(["apt-get", "download", "-qq", "nginx"], cwd=directory, check=True)
        for package in Path(directory).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), "unpacked"], cwd=directory, check=True)
        yield str(Path(directory, "unpacked/usr/sbin/nginx"))
    except subprocess.CalledProcessError:
        print("nginx could not be fetched: not measured", file=sys.stderr)
        yield ""
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def sglang_router(core: set[int], service_address: str) -> Iterator[Contender]:
    """sglang-router, which checks nothing; its own environment."""
    python = _environment("sglang-router", "sglang-router")
    port = free_port()
    command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://{service_address}", "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port()), "--log-level", "error"]
    with started(command, core) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield Contender("sglang-router", f"http://127.0.0.1:{port}{CHAT}", children(process.pid))


@contextmanager
def litellm(core: set[int], service_address: str, stores: Stores) -> Iterator[Contender]:
    """LiteLLM's proxy with a database of its own, Redis, a virtual key and limits; its own environment."""
    python = _environment("litellm", "litellm[proxy]", "prisma")
    port, master = free_port(), "sk-bench"
    parts = urlsplit(stores.postgres_url)
    database = urlunsplit(parts._replace(path="/litellm"))
    redis = urlsplit(stores.redis_url)
    _create_database(stores.postgres_url, "litellm")
    configuration = {
        "model_list": [
            {
                "model_name": "bench",
                "litellm_params": {"model": "openai/bench", "api_base": f"http://{service_address}/v1", "api_key": "x"},
            }
        ],
        "general_settings": {"master_key": master, "database_url": database},
        "litellm_settings": {"cache": False, "set_verbose": False},
        "router_settings": {"redis_host": redis.hostname, "redis_port": redis.port, "redis_password": redis.password},
    }
    directory = tempfile.mkdtemp(prefix="tollgate-bench-litellm-")
    file = Path(directory, "config.yaml")
    file.write_text(json.dumps(configuration))  # JSON is YAML
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "DATABASE_URL": database}
    schema = next(python.parents[1].glob("lib/*/site-packages/litellm/proxy/schema.prisma"))
    subprocess.run([python.parent / "prisma", "generate", "--schema", schema], env=environment, check=True)
    command = [str(python.parent / "litellm"), "--config", str(file), "--port", str(port), "--host", "127.0.0.1"]
    try:
        with started(command, core, environment=environment) as process:
            wait_for(f"http://127.0.0.1:{port}/health/liveliness", process, 600)
            key = _virtual_key(port, master)
            headers = {"authorization": f"Bearer {key}"}
            yield Contender("litellm", f"http://127.0.0.1:{port}{CHAT}", children(process.pid), headers)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _environment(name: str, *packages: str) -> Path:
    """The Python of an environment that has these; made at the first time."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not (ENVIRONMENTS / name / "complete").exists():
        ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENTS / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (ENVIRONMENTS / name / "complete").touch()
    return python


def _create_database(owner_url: str, name: str) -> None:
    async def create() -> None:
        connection = await asyncpg.connect(owner_url)
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                await connection.execute(f'CREATE DATABASE "{name}"')
        finally:
            await connection.close()

    asyncio.run(create())


def _virtual_key(port: int, master: str) -> str:
    """A key with the same limits as ours."""
    body = {"models": ["bench"], "rpm_limit": LIMITS["minute"], "max_parallel_requests": LIMITS["concurrency"]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/key/generate",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {master}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        key: str = json.load(answer)["key"]
    return key
