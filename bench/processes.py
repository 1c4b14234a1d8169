"""CPU time of the processes behind a path, user and system, while a block runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from deploy.local import processes
from deploy.local.state import Layout
from deploy.local.triton import SERVER, STUB

SERVICES = ("gateway", "chat", "inference", "billing", "auth")
LOAD = "load generator"
Look = Callable[[], dict[str, float]]


class Cpu:
    """`seconds` by the name of the program, after the block; what took none is left out."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._before: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @staticmethod
    def of(pid: int) -> Cpu:
        """One process, called the engine, and the load generator: this process."""
        return Cpu(lambda: {"engine": _seconds(pid), LOAD: _seconds(os.getpid())})

    @staticmethod
    def of_stack(state: Path) -> Cpu:
        """Every process of a stack, and the load generator."""
        stack_id = Layout(root=Path(), state=state.resolve()).stack_id
        return Cpu(lambda: {**_by_program(stack_id), LOAD: _seconds(os.getpid())})

    def __enter__(self) -> Cpu:
        self._before = self._look()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        spent = {name: total - self._before.get(name, 0.0) for name, total in self._look().items()}
        self.seconds = {name: seconds for name, seconds in sorted(spent.items()) if seconds > 0}


def machine_s() -> float:
    """Seconds that the machine's processors have worked, for anybody, since it began."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _by_program(stack_id: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pid in _family(processes.of_stack(stack_id)):
        try:
            name = _program(psutil.Process(pid))
        except psutil.Error:
            continue
        found[name] = found.get(name, 0.0) + _seconds(pid)
    return found


def _family(pids: set[int]) -> set[int]:
    """With their descendants: PostgreSQL writes its titles over the mark by which a stack's processes are known."""
    parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
    found, more = set(pids), set(pids)
    while more := {pid for pid, parent in parents.items() if parent in more} - found:
        found |= more
    return found


def _program(process: psutil.Process) -> str:
    name = processes.executable(process.pid)
    if name == STUB:
        return "backend"
    if name == SERVER:
        return "triton"
    words = process.cmdline()
    for service in SERVICES:
        if f"services.{service}" in words:
            return service
    for component in ("postgres", "valkey"):
        if component in name:
            return component
    return "others"


def _seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
