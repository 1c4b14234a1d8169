"""A tritonserver of these tests' own, with builds made for them, so that killing and filling them disturbs nobody.

`repository`  session; a model repository of symbolic links into triton_models:
              `plain` (4 slots) and `other` (another quantization, 2 slots); `calm` (a chunk
              in 30 ms); `narrow` (1 slot, a queue of 4, 2 of a
              tenant, small prefill batches); `churned` (4 slots, for requests that may never arrive); `moved`,
              which is unloaded; `frail`, which tests kill; `stuck`, whose engine falls silent when it is told to.
`triton`      session; tritonserver on it, nothing loaded.
`backend`     a client with the builds but `frail` and `stuck` loaded.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from deploy.local import processes
from deploy.local.errors import NotReady
from deploy.local.state import Layout, load_ports
from deploy.local.triton import Triton, reap
from deploy.local.triton_guard import Stub, live_stubs
from tests.inference.client import BackendClient
from tests.inference.running import CATALOGUE, RunningService, running_service

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "triton_models"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1
GUARD = {"TOLLGATE_TRITON_SILENCE_S": "15", "TOLLGATE_TRITON_SUPERSEDED_S": "10"}

BUILDS: dict[str, tuple[str, dict[str, int | str]]] = {
    "plain": ("chat-mini-q8_0", {"slots": 4}),
    "other": ("chat-mini-q4_k_m", {"slots": 2}),
    "calm": ("chat-mini-q8_0", {"slots": 1, "chunk_interval_us": 30_000}),
    "narrow": ("chat-mini-q8_0", {"slots": 1, "queue_max": 4, "tenant_queue_max": 2, "batch_tokens": 8}),
    "churned": ("chat-mini-q8_0", {"slots": 4, "tenant_slots_max": 4}),
    "moved": ("chat-mini-q4_k_m", {"slots": 1}),
    "frail": ("chat-mini-q8_0", {"slots": 2}),
    "stuck": ("chat-mini-q8_0", {"slots": 2, "engine": "falls-silent", "engine_silence_ms": 500}),
}
ON_DEMAND = ("frail", "stuck")


STUCK = f"""
import sys, time
sys.path.append({str(ROOT)!r})
from services.inference.backend import model
from services.inference.backend.llamacpp import LlamaCpp

class FallsSilent(LlamaCpp):
    def generate(self, request, tenant, on_chunk, cancelled):
        def say(chunk):
            on_chunk(chunk)
            while "fall silent" in str(request["messages"]) and chunk.usage.completion_tokens > 5:
                time.sleep(60)
        return super().generate(request, tenant, say, cancelled)

model.ENGINES["falls-silent"] = FallsSilent
TritonPythonModel = model.TritonPythonModel
"""


def add_build(repository: Path, name: str, weights: str, parameters: dict[str, int | str]) -> None:
    """A build that shares code and weights with one of triton_models."""
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    for file in ("model.py", "model.gguf"):
        (folder / "1" / file).symlink_to(MODELS / weights / "1" / file)
    entries = {"engine": "llama.cpp", "context_tokens": 1024, "threads": 1, **parameters}
    config = (MODELS / weights / "config.pbtxt").read_text().partition("parameters")[0]
    config = config.replace(f'"{weights}"', f'"{name}"')
    lines = (f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in entries.items())
    (folder / "config.pbtxt").write_text(config + "".join(lines))


@pytest.fixture(scope="session")
def repository(state_directory: Path) -> Path:
    path = state_directory / "triton_models"
    for name, (weights, parameters) in BUILDS.items():
        add_build(path, name, weights, parameters)
    source = path / "stuck" / "1" / "model.py"
    source.unlink()
    source.write_text(STUCK)
    return path


@dataclass(frozen=True)
class OwnTriton(Triton):
    """The launcher's Triton on another repository."""

    models: Path

    @property
    def repository(self) -> Path:
        return self.models


@dataclass
class RunningTriton:
    """A tritonserver that tests may stop, start again and kill the stubs of."""

    server: Triton
    process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    def start(self) -> None:
        """Returns when the server answers."""
        program = self.server.program()
        stack_id = self.server.layout.stack_id
        log = (self.server.layout.log / "triton.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                program.command,
                cwd=program.directory,
                env={**program.environment, **processes.marker(stack_id), **GUARD},
                stdout=log,
                stderr=subprocess.STDOUT,
                # A test session that is killed takes its server along.
                preexec_fn=partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                program.health()
                return
            except NotReady:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def supervise(self) -> None:
        """Start it again if it has died, as the stack's supervisor does."""
        assert self.process is not None
        if self.process.poll() is not None:
            self.start()

    def stop(self) -> None:
        """A graceful end; then nothing is left."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(STOP_TIMEOUT_S)
        reap(self.server.layout.stack_id)

    def stub(self, build: str) -> int:
        """The process id of a build's live stub."""
        assert self.process is not None
        return self._youngest(build).pid

    def version(self, build: str) -> str:
        """Which version of a build its live stub serves."""
        return Path(self._youngest(build).model).parent.name

    def _youngest(self, build: str) -> Stub:
        """While an old one finishes its streams there are two."""
        stubs = [s for s in live_stubs(self.server.layout.stack_id) if Path(s.model).parts[-3] == build]
        assert stubs, f"{build} has no process"
        return max(stubs, key=lambda stub: stub.started)

    def kill_stub(self, build: str) -> None:
        os.kill(self.stub(build), signal.SIGKILL)

    def metrics(self, build: str) -> dict[str, float]:
        """tollgate_engine_* of a build, without the prefix and without histograms' buckets; errors by `errors:code`."""
        with urllib.request.urlopen(self.server.metrics_url, timeout=30) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            name, _, rest = line.partition("{")
            labels, _, value = rest.partition("} ")
            if name.startswith("tollgate_engine_") and f'build="{build}"' in labels and "le=" not in labels:
                code = labels.partition('code="')[2].rstrip('"')
                found[name.removeprefix("tollgate_engine_") + (f":{code}" if code else "")] = float(value)
        return found


@pytest.fixture(scope="session")
def triton(state_directory: Path, repository: Path) -> Iterator[RunningTriton]:
    layout = Layout(ROOT, state_directory / "own-triton")
    layout.prepare()
    ports = load_ports(layout, 0, check=True)
    server = OwnTriton(
        layout=layout,
        http_port=ports["triton_http"],
        grpc_port=ports["triton_grpc"],
        metrics_port=ports["triton_metrics"],
        otlp_endpoint=None,
        models=repository,
    )
    running = RunningTriton(server)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
async def backend_client(triton: RunningTriton) -> AsyncIterator[BackendClient]:
    client = BackendClient(triton.grpc_address)
    yield client
    await client.close()


@pytest.fixture
async def backend(backend_client: BackendClient) -> BackendClient:
    if not await backend_client.is_ready("plain"):  # the first test, or another one has killed the server
        await asyncio.gather(*(backend_client.load(name) for name in BUILDS if name not in ON_DEMAND))
        backend_client.sent.clear()
    return backend_client


@pytest.fixture
async def service(
    triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningService]:
    (repository / "catalogue.toml").write_text(CATALOGUE)
    async with running_service(triton.grpc_address, repository, monkeypatch) as running:
        yield running


@pytest.fixture
async def client(triton: RunningTriton) -> AsyncIterator[BackendClient]:
    client = BackendClient(triton.grpc_address)
    yield client
    await client.close()
