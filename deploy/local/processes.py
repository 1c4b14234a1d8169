"""The processes of a stack as the kernel sees them: what supervisord no longer knows of must still be found."""

import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

MARKER = "TOLLGATE_STACK"
# PostgreSQL takes SIGTERM for "when the last client has gone"; SIGINT is a quick and clean end to all programs here.
GRACEFUL = signal.SIGINT
FORCED = signal.SIGKILL


def marker(stack_id: str) -> Mapping[str, str]:
    """The environment variable that every process of a stack carries, and its children inherit."""
    return {MARKER: stack_id}


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


def of_stack(stack_id: str) -> set[int]:
    """Every live process that carries the stack's marker, whoever its parent is now."""
    wanted = f"{MARKER}={stack_id}".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # another user's, or gone
        if wanted in environment.split(b"\0") and is_alive(int(entry.name)):
            found.add(int(entry.name))
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal; a process that ended meanwhile is fine."""
    for pid in pids:
        assert pid > 1, "0 and below are groups of processes, 1 is init"
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_gone(pids: Iterable[int], timeout_s: float) -> set[int]:
    """Wait for processes to end; those that still live after `timeout_s` come back."""
    remaining = {pid for pid in pids if is_alive(pid)}
    deadline = time.monotonic() + timeout_s
    while remaining and time.monotonic() < deadline:
        time.sleep(0.02)
        remaining = {pid for pid in remaining if is_alive(pid)}
    return remaining


def executable(pid: int) -> str:
    """The name of the program that a process runs; empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""
