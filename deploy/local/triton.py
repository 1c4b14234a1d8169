"""tritonserver out of the wheel `nvidia-pytriton`, on the CPU, with an environment of its own.

The Python backend starts one stub process a model. The stub embeds the Python of `.venv-triton`, which is first in
PATH, and shares memory with the server under a name that begins with this stack's own prefix; whoever dies by SIGKILL
leaves stubs and regions behind, so they are removed before each start and after each stop. triton_guard.py is the
process between the supervisor and the server.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from deploy.local import processes
from deploy.local.errors import LaunchError
from deploy.local.programs import Program, http_health
from deploy.local.state import Layout

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 POSIX shared memory lives here
EXIT_TIMEOUT_S = 8
REAP_TIMEOUT_S = 5.0
SERVER = "tritonserver"
STUB = "triton_python_backend_stub"


def region_prefix(stack_id: str) -> str:
    """What the names of this stack's shared memory regions begin with."""
    return f"triton_python_{stack_id}_"


def regions(stack_id: str) -> list[Path]:
    """The shared memory that this stack's stubs left or use."""
    return sorted(SHARED_MEMORY.glob(f"{region_prefix(stack_id)}*"))


def reap(stack_id: str) -> None:
    """End the stack's server and stubs and remove their shared memory: what a dead one left, as a rule."""
    left = {pid for pid in processes.of_stack(stack_id) if processes.executable(pid) in (SERVER, STUB)}
    processes.send(left, processes.FORCED)
    processes.wait_gone(left, REAP_TIMEOUT_S)
    for region in regions(stack_id):
        region.unlink(missing_ok=True)


def site_packages(environment: Path) -> Path:
    """The package directory of a virtual environment."""
    return next(iter(sorted((environment / "lib").glob("python3.*")))) / "site-packages"


def prepare_backends(environment: Path) -> None:
    """Copy the Python backend with the stub of the environment's Python beside it, out of the wheel's own files."""
    packages = site_packages(environment)
    server = packages / "pytriton" / "tritonserver"
    version = packages.parent.name.removeprefix("python")
    target = environment / "backends"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(server / "backends", target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(server / "python_backend_stubs" / version / STUB, target / "python" / STUB)


@dataclass(frozen=True, slots=True)
class Triton:
    """The server of one stack."""

    layout: Layout
    http_port: int
    grpc_port: int
    metrics_port: int
    otlp_endpoint: str | None

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def live_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/v2/health/live"

    @property
    def repository(self) -> Path:
        return self.layout.models

    def program(self) -> Program:
        """The server without a model: the inference service loads what the catalogue lists."""
        environment = self.layout.triton_environment
        try:
            libpython = json.loads((environment / "tollgate.json").read_text())["libpython"]
        except FileNotFoundError:
            raise LaunchError("Triton's environment has not been made yet: `make environments` does.") from None
        packages = site_packages(environment)
        return Program(
            name="triton",
            title="Triton 2.51",
            command=(
                *(str(self.layout.python), "-m", "deploy.local.triton_guard", self.layout.stack_id, self.live_url),
                *(str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"), *self._arguments()),
            ),
            directory=self.layout.root,
            environment={
                "PATH": f"{environment / 'bin'}:{os.defpath}",
                "LD_LIBRARY_PATH": f"{libpython}:{packages / 'nvidia_pytriton.libs'}",
            },
            ports=(self.http_port, self.grpc_port, self.metrics_port),
            health=http_health(f"http://127.0.0.1:{self.http_port}/v2/health/ready"),
            deadline_s=120,
            remedy="If a shared library is missing, remove .venv-triton and run `make up` again; if memory is, look at "
            "`df /dev/shm` (Docker: --shm-size).",
            stop_wait_s=EXIT_TIMEOUT_S + 5,
            # The server ends its stubs itself; a signal of their own would end them before their models unload.
            signal_group=False,
        )

    def _arguments(self) -> tuple[str, ...]:
        return (
            f"--model-repository={self.repository}",
            f"--backend-directory={self.layout.triton_environment / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={region_prefix(self.layout.stack_id)}",
            *("--http-address=127.0.0.1", f"--http-port={self.http_port}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={self.grpc_port}"),
            *("--metrics-address=127.0.0.1", f"--metrics-port={self.metrics_port}", "--allow-gpu-metrics=false"),
            *("--disable-auto-complete-config", "--model-control-mode=explicit"),
            # A build that cannot be loaded is the catalogue's to report; the other builds go on.
            "--strict-readiness=false",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            *self._tracing(),
        )

    def _tracing(self) -> tuple[str, ...]:
        if not self.otlp_endpoint:
            return ()
        # Rate 0: no trace of its own, only those that a request's `traceparent` continues.
        url = f"opentelemetry,url={self.otlp_endpoint.rstrip('/')}/v1/traces"
        settings = ("mode=opentelemetry", url, "level=TIMESTAMPS", "rate=0")
        return tuple(part for setting in settings for part in ("--trace-config", setting))
