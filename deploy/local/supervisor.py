"""supervisord: its configuration, its life, and its RPC over a private UNIX socket."""

import http.client
import os
import shlex
import socket
import subprocess
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deploy.local import processes
from deploy.local.errors import LaunchError
from deploy.local.programs import Program
from deploy.local.state import Layout, write_private

RPC_TIMEOUT_S = 10.0
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 60.0
LOG_BYTES = 5 * 1024 * 1024
LOG_BACKUPS = 2
# supervisord waits 1, 2, 3, … seconds between attempts: this many are about an hour and a half.
START_RETRIES = 100
# A program that ended sooner than this never ran, and backs off.
START_SECONDS = 1

RUNNING_STATES = frozenset({"STARTING", "RUNNING", "BACKOFF", "STOPPING"})


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What supervisord says of a program. `started_s` is Unix time, 0 when it never ran."""

    name: str
    state: str
    pid: int
    started_s: int
    detail: str


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=RPC_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _SocketTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = _SocketConnection(self._path)
        self._connection = host, connection  # what close() closes
        return connection


class Supervisor:
    """The supervisord of one stack."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = _SocketTransport(self._layout.supervisor_socket)
        with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def is_running(self) -> bool:
        """Whether a supervisord answers on the stack's socket."""
        try:
            state = self._call("getState")
        except (OSError, http.client.HTTPException, xmlrpc.client.Error):
            return False
        return bool(state["statename"] == "RUNNING")

    def launch(self, programs: Iterable[Program], marker: Mapping[str, str]) -> None:
        """Start supervisord with none of its programs; `marker` goes into every process's environment.

        Raises LaunchError when it does not answer in time.
        """
        layout = self._layout
        write_private(layout.supervisor_config, render_config(layout, programs))
        layout.supervisor_socket.unlink(missing_ok=True)
        command = (str(layout.python), "-m", "supervisor.supervisord", "-c", str(layout.supervisor_config))
        result = subprocess.run(
            command,
            env=base_environment() | dict(marker),
            cwd=layout.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if result.returncode != 0:
            raise LaunchError(f"The supervisor did not start: {result.stderr.strip() or result.stdout.strip()}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_running():
            if time.monotonic() > deadline:
                raise LaunchError(f"The supervisor does not answer; see {layout.log / 'supervisord.log'}.")
            time.sleep(0.05)

    def states(self) -> dict[str, ProcessState]:
        """The state of every program by its name; empty when no supervisord runs."""
        try:
            rows = cast(list[dict[str, Any]], self._call("getAllProcessInfo"))
        except (OSError, http.client.HTTPException, xmlrpc.client.Error):
            return {}
        return {
            row["name"]: ProcessState(
                name=row["name"],
                state=row["statename"],
                pid=row["pid"],
                started_s=row["start"],
                detail=row["spawnerr"] or row["description"],
            )
            for row in rows
        }

    def pids(self) -> dict[str, int]:
        """The process id of every program, 0 for one that does not run; empty when no supervisord runs."""
        return {name: state.pid for name, state in self.states().items()}

    def start(self, name: str) -> None:
        """Start a program unless it runs, starts or waits for its next attempt."""
        state = self.states().get(name)
        if state is None or state.state not in RUNNING_STATES:
            self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        """Stop a program and wait for its end; supervisord kills it when it takes too long."""
        self._call("stopProcess", name, False)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.states()[name].state in RUNNING_STATES:
            if time.monotonic() > deadline:
                raise LaunchError(f"{name} does not stop.")
            time.sleep(0.05)

    def shut_down(self, order: Iterable[tuple[str, ...]]) -> None:
        """Stop the programs, one group after the other, then supervisord itself. Returns when it has gone."""
        pid = self.pid()
        for group in order:
            for name in group:
                try:
                    self._call("stopProcess", name, False)
                except xmlrpc.client.Fault:
                    continue  # not running
            self._wait_stopped(group)
        self._call("shutdown")
        if pid is not None:
            processes.wait_gone({pid}, STOP_TIMEOUT_S)

    def _wait_stopped(self, names: tuple[str, ...]) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            states = self.states()
            if not any(states[name].state in RUNNING_STATES for name in names if name in states):
                return
            time.sleep(0.05)

    def pid(self) -> int | None:
        """The process id that supervisord wrote down, alive or not."""
        try:
            return int(self._layout.supervisor_pid.read_text())
        except (OSError, ValueError):
            return None

    def starts(self) -> dict[str, int]:
        """How often each program was started since this supervisord began, from its own log."""
        counts: dict[str, int] = {}
        log = self._layout.log / "supervisord.log"
        lines = [line for path in (log.with_name(f"{log.name}.1"), log) for line in _lines(path)]
        for line in lines:
            if "supervisord started with pid" in line:
                counts.clear()
            elif "spawned: '" in line:
                name = line.split("spawned: '", 1)[1].split("'", 1)[0]
                counts[name] = counts.get(name, 0) + 1
        return counts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def base_environment() -> dict[str, str]:
    """What every process of the stack inherits from the shell: no secrets, no Python settings, no proxies."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TZ", "TMPDIR") if name in os.environ}
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONUNBUFFERED": "1"} | kept


def render_config(layout: Layout, programs: Iterable[Program]) -> str:
    """supervisord.conf. Raises LaunchError for a path or value that the format cannot hold."""
    sections = [
        "[unix_http_server]",
        f"file = {_text(str(layout.supervisor_socket))}",
        "chmod = 0700",
        "",
        "[supervisord]",
        f"logfile = {_text(str(layout.log / 'supervisord.log'))}",
        f"logfile_maxbytes = {LOG_BYTES}",
        "logfile_backups = 1",
        f"pidfile = {_text(str(layout.supervisor_pid))}",
        f"directory = {_text(str(layout.root))}",
        "umask = 077",
        *(["user = root"] if os.geteuid() == 0 else []),
        "",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in programs:
        sections += ["", *_render_program(layout, program)]
    return "\n".join(sections) + "\n"


def _render_program(layout: Layout, program: Program) -> list[str]:
    environment = ",".join(f'{name}="{_text(value)}"' for name, value in sorted(program.environment.items()))
    return [
        f"[program:{program.name}]",
        f"command = {_text(shlex.join(program.command), quotes=True)}",
        f"directory = {_text(str(program.directory))}",
        f"environment = {environment}",
        "autostart = false",
        "autorestart = true",
        f"startsecs = {START_SECONDS}",
        f"startretries = {START_RETRIES}",
        f"stopsignal = {program.stop_signal}",
        f"stopwaitsecs = {program.stop_wait_s}",
        f"stopasgroup = {str(program.signal_group).lower()}",
        "killasgroup = true",
        "redirect_stderr = true",
        f"stdout_logfile = {_text(str(layout.log / f'{program.name}.log'))}",
        f"stdout_logfile_maxbytes = {LOG_BYTES}",
        f"stdout_logfile_backups = {LOG_BACKUPS}",
    ]


def _text(value: str, *, quotes: bool = False) -> str:
    """A value for the configuration, where % expands, `;` after a space comments, and lines end values."""
    forbidden = "\n\r" if quotes else "\n\r\"'"
    if any(character in value for character in forbidden) or " ;" in value:
        raise LaunchError(f"The stack cannot run with a path or setting such as {value!r}: move it to a plain path.")
    return value.replace("%", "%%")
