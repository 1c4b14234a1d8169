"""What is measured: how each contender is started, on a core of its own, in front of the same service."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.edge.stores import Stores
from bench.stack import ROOT
from deploy.local.ports import pick_port

CHAT = "/v1/chat/completions"
START_TIMEOUT_S = 120.0
TICKS = os.sysconf("SC_CLK_TCK")

NGINX = """
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log {directory}/access.log;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f;
  uwsgi_temp_path {directory}/u;
  scgi_temp_path {directory}/s;
  keepalive_requests 100000000;
  upstream service {{ server {service}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      {auth}
      proxy_pass http://service;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering {buffering};
    }}
    location = /auth {{
      internal;
      proxy_pass http://service/auth;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """One that runs. `pids` are all of its processes, `store_pids` those of what it asks; `urls` share the load."""

    name: str
    urls: Sequence[str]
    pids: Sequence[int]
    headers: Mapping[str, str] = field(default_factory=dict)
    store_pids: Sequence[int] = ()

    def cpu_s(self) -> float:
        return cpu_s(self.pids)

    def rss_mb(self) -> float:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time of processes so far, user and system, from /proc/PID/stat."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def cores() -> tuple[set[int], set[int]]:
    """One core for the contender, the rest for everything else."""
    available = sorted(os.sched_getaffinity(0))
    return {available[0]}, set(available[1:]) or {available[0]}


@contextmanager
def started(
    command: Sequence[str], core: set[int], *, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on those cores, in a group of its own; ended at the end, gently at first."""
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, sorted(core))), *command],
        cwd=cwd,
        env=dict(environment) if environment is not None else None,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], timeout_s: float = START_TIMEOUT_S) -> None:
    """Until something answers there. Raises RuntimeError when the process ended or nothing did."""
    ends_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < ends_s:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nothing answers at {url}")


def children(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += children(int(child))
    return found


@contextmanager
def service(core: set[int]) -> Iterator[str]:
    """The service behind all of them: its host:port."""
    address = f"127.0.0.1:{pick_port()}"
    with started([sys.executable, "-m", "bench.edge.service", address], core) as process:
        wait_for(f"http://{address}/healthz", process)
        yield address


@contextmanager
def gateways(core: set[int], service_address: str, stores: Stores, count: int) -> Iterator[Contender]:
    """So many of ours on the one core, before one Redis."""
    with ExitStack() as stack:
        ours = [stack.enter_context(gateway(core, service_address, stores)) for _ in range(count)]
        urls, pids = [each.urls[0] for each in ours], [each.pids[0] for each in ours]
        yield replace(ours[0], name=f"tollgate x {count}", urls=urls, pids=pids)


@contextmanager
def gateway(core: set[int], service_address: str, stores: Stores) -> Iterator[Contender]:
    """Ours: key, three windows and concurrency on."""
    port, internal = pick_port(), pick_port()
    environment = {
        **stores.environment,
        "TOLLGATE_GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "TOLLGATE_GATEWAY_INTERNAL_LISTEN": f"127.0.0.1:{internal}",
        **{f"TOLLGATE_{name}_URL": f"http://{service_address}" for name in ("AUTH", "BILLING", "CHAT", "INFERENCE")},
    }
    with started([sys.executable, "-m", "services.gateway"], core, environment=environment) as process:
        wait_for(f"http://127.0.0.1:{port}/healthz", process)
        headers = {"authorization": f"Bearer {stores.key}"}
        url = f"http://127.0.0.1:{port}{CHAT}"
        yield Contender("tollgate", [url], [process.pid], headers, store_pids=[stores.redis_pid])


@contextmanager
def nginx(core: set[int], service_address: str, binary: str, *, auth: bool) -> Iterator[Contender]:
    """nginx in front of the service, with a sub-request for each request or without."""
    port, directory = pick_port(), tempfile.mkdtemp(prefix="tollgate-bench-nginx-")
    Path(directory).chmod(0o755)
    configuration = Path(directory, "nginx.conf")
    configuration.write_text(
        NGINX.format(
            directory=directory,
            service=service_address,
            port=port,
            auth="auth_request /auth;" if auth else "",
            buffering="off",
        )
    )
    try:
        with started([binary, "-p", directory, "-c", str(configuration)], core) as process:
            wait_for(f"http://127.0.0.1:{port}/healthz", process)
            name = "nginx auth_request" if auth else "nginx"
            yield Contender(name, [f"http://127.0.0.1:{port}{CHAT}"], children(process.pid))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def bare(core: set[int], service_address: str) -> Iterator[Contender]:
    """A relay of uvicorn and aiohttp that checks nothing."""
    address = f"127.0.0.1:{pick_port()}"
    command = [sys.executable, "-m", "bench.edge.bare", address, f"http://{service_address}"]
    with started(command, core) as process:
        wait_for(f"http://{address}/healthz", process)
        yield Contender("bare relay", [f"http://{address}{CHAT}"], [process.pid])


@contextmanager
def direct(service_address: str) -> Iterator[Contender]:
    """Nothing between: what the load and the service cost themselves."""
    yield Contender("direct", [f"http://{service_address}{CHAT}"], [])
