"""Contenders that are not ours and come from outside: fetched by the bench, never a dependency.

nginx from PATH, else Debian's package, unpacked in a temporary place. sglang-router from its wheel, LiteLLM's proxy
from PyPI, each in an environment of its own under .tollgate/bench.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.edge.contenders import CHAT, Contender, children, started, wait_for
from bench.stack import ROOT
from deploy.local.ports import pick_port

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
    port = pick_port()
    command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://{service_address}", "--policy", "round_robin"]
    command += ["--prometheus-port", str(pick_port()), "--log-level", "error"]
    with started(command, core) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield Contender("sglang-router", [f"http://127.0.0.1:{port}{CHAT}"], children(process.pid))


@contextmanager
def litellm(core: set[int], service_address: str) -> Iterator[Contender]:
    """LiteLLM's proxy in an environment of its own, with its master key only.

    Virtual keys, limits and spend want its database, whose client (Prisma) is a binary from a server of its own.
    Without them it does less than ours for a request, so that the comparison flatters it.
    """
    python = _environment("litellm", "litellm[proxy]")
    port, master = pick_port(), "sk-bench"
    target = {"model": "openai/bench", "api_base": f"http://{service_address}/v1", "api_key": "x"}
    configuration = {
        "model_list": [{"model_name": "bench", "litellm_params": target}],
        "general_settings": {"master_key": master},
    }
    directory = tempfile.mkdtemp(prefix="tollgate-bench-litellm-")
    file = Path(directory, "config.yaml")
    file.write_text(json.dumps(configuration))  # JSON is YAML
    command = [str(python.parent / "litellm"), "--config", str(file), "--port", str(port), "--host", "127.0.0.1"]
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": directory, "LITELLM_LOG": "ERROR"}
    try:
        with started(command, core, environment=environment) as process:
            wait_for(f"http://127.0.0.1:{port}/health/liveliness", process)
            headers = {"authorization": f"Bearer {master}"}
            url = f"http://127.0.0.1:{port}{CHAT}"
            yield Contender("litellm, no database", [url], children(process.pid), headers)
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
