"""Waiting for a program, and what is said of one that does not become healthy."""

import time

from deploy.local.errors import NotReady, ProgramFailed
from deploy.local.programs import Program
from deploy.local.state import Layout
from deploy.local.supervisor import Supervisor

POLL_S = 0.1
LOG_TAIL_LINES = 20
LOG_LINE_CHARS = 400
# A program that ended this often before it was healthy once will not be healthy later.
MAX_FAILED_STARTS = 3


def wait_healthy(supervisor: Supervisor, layout: Layout, program: Program) -> None:
    """Wait for the program's own health check. Raises ProgramFailed with the end of its log and the remedy."""
    deadline = time.monotonic() + program.deadline_s
    starts_before = supervisor.starts().get(program.name, 0)
    while (problem := why_unhealthy(supervisor, program)) is not None:
        state = supervisor.states().get(program.name)
        failed_starts = supervisor.starts().get(program.name, 0) - starts_before
        if state is None or state.state in {"FATAL", "STOPPED"} or failed_starts >= MAX_FAILED_STARTS:
            problem = (
                f"it keeps ending ({(state.detail or state.state.lower()) if state else 'the supervisor is gone'})"
            )
        elif time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        else:
            problem = f"not healthy after {program.deadline_s:.0f} s: {problem}"
        raise ProgramFailed(program.name, _failure(layout, program, problem))


def why_unhealthy(supervisor: Supervisor, program: Program) -> str | None:
    """None for a program that runs and passes its check. Both are asked: the port may be somebody else's."""
    state = supervisor.states().get(program.name)
    if state is None or state.pid == 0:
        return "it does not run"
    try:
        program.health()
    except NotReady as error:
        return str(error)
    return None


def log_tail(layout: Layout, name: str, lines: int = LOG_TAIL_LINES) -> list[str]:
    """The last lines of a program's log; none when it has none."""
    path = layout.log / f"{name}.log"
    return path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else []


def _failure(layout: Layout, program: Program, problem: str) -> str:
    lines = (
        line if len(line) <= LOG_LINE_CHARS else f"{line[:LOG_LINE_CHARS]} …" for line in log_tail(layout, program.name)
    )
    tail = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
    path = layout.log / f"{program.name}.log"
    return f"{program.title} failed: {problem}\n  The end of {path}:\n{tail}\n  What to do: {program.remedy}"
