"""`make status`: one line a program, as supervisord, its health check and the kernel see it."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from deploy.local.health import why_unhealthy
from deploy.local.programs import Program
from deploy.local.supervisor import ProcessState, Supervisor

HEADINGS = ("program", "state", "pid", "restarts", "uptime", "memory", "ports", "health")


@dataclass(frozen=True, slots=True)
class Row:
    """One program. `problem` is None when it is healthy; `memory_bytes` counts shared pages once, with its children."""

    name: str
    state: str
    pid: int
    restarts: int
    uptime_s: int
    memory_bytes: int
    ports: tuple[int, ...]
    problem: str | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS."""
        return (
            self.name,
            self.state.lower(),
            str(self.pid or "-"),
            str(self.restarts),
            _duration(self.uptime_s) if self.pid else "-",
            f"{self.memory_bytes / 1024**2:.0f} MiB" if self.pid else "-",
            " ".join(map(str, self.ports)),
            "ok" if self.problem is None else self.problem.splitlines()[0],
        )


def rows(supervisor: Supervisor, programs: Sequence[Program]) -> list[Row]:
    """The state of every program, health checks side by side."""
    states, starts = supervisor.states(), supervisor.starts()
    with ThreadPoolExecutor(len(programs)) as pool:
        problems = pool.map(lambda program: why_unhealthy(supervisor, program), programs)
    return [
        _row(program, states.get(program.name), starts.get(program.name, 0), problem)
        for program, problem in zip(programs, problems, strict=True)
    ]


def _row(program: Program, state: ProcessState | None, starts: int, problem: str | None) -> Row:
    pid = state.pid if state else 0
    return Row(
        name=program.name,
        state=state.state if state else "STOPPED",
        pid=pid,
        restarts=max(0, starts - 1),
        uptime_s=max(0, int(time.time()) - state.started_s) if state and pid else 0,
        memory_bytes=memory_bytes(pid) if pid else 0,
        ports=program.ports,
        problem=problem,
    )


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants: the sum over processes is what they really hold."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_proportional(member) for member in family)


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def table(lines: Sequence[Row]) -> str:
    """Columns under headings, and a line with the sum of the memory."""
    cells = [HEADINGS, *(row.cells() for row in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    total = sum(row.memory_bytes for row in lines)
    return "\n".join([*text, f"memory of the whole stack: {total / 1024**2:.0f} MiB"])


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
