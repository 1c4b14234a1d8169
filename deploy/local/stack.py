"""One stack from start to end: what is started in which order, waited for, stopped, and shown."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from deploy.local import processes
from deploy.local.errors import NotReady, ProgramFailed
from deploy.local.postgres import Postgres
from deploy.local.programs import Program
from deploy.local.progress import Progress
from deploy.local.state import Layout, load_ports, load_secrets
from deploy.local.supervisor import Supervisor
from deploy.local.valkey import Valkey

POLL_S = 0.05
LOG_TAIL_LINES = 20
# A program that ended this often before it was healthy once will not be healthy later.
MAX_FAILED_STARTS = 3
ORPHAN_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class DataStores:
    """PostgreSQL and Valkey under a supervisor of their own: what service-level tests need."""

    layout: Layout
    postgres: Postgres
    valkey: Valkey

    @classmethod
    def prepare(cls, layout: Layout) -> "DataStores":
        """Make the state directory, its secrets and its ports."""
        layout.prepare()
        secrets = load_secrets(layout)
        ports = load_ports(layout, 0, check=True)
        return cls(layout, Postgres(layout, secrets, ports["postgres"]), Valkey(layout, secrets, ports["valkey"]))

    def up(self, progress: Progress) -> None:
        """Start both and make the databases. Raises LaunchError; stop() cleans up in any case."""
        self.postgres.initialise()
        self.valkey.initialise()
        supervisor = Supervisor(self.layout)
        programs = (self.postgres.program(), self.valkey.program())
        supervisor.launch(programs, processes.marker(self.layout.stack_id))
        for program in programs:
            supervisor.start(program.name)
        for program in programs:
            with progress.step(program.title):
                wait_healthy(supervisor, self.layout, program)
        self.postgres.create_databases()

    def stop(self) -> None:
        """Stop both, whatever state they are in."""
        stop_everything(self.layout, (("valkey", "postgres"),))


def wait_healthy(supervisor: Supervisor, layout: Layout, program: Program) -> None:
    """Wait for the program's own health check. Raises ProgramFailed with the end of its log and the remedy."""
    deadline = time.monotonic() + program.deadline_s
    starts_before = supervisor.starts().get(program.name, 0)
    while True:
        try:
            program.health()
            return
        except NotReady as error:
            reason = str(error)
        state = supervisor.states().get(program.name)
        failed_starts = supervisor.starts().get(program.name, 0) - starts_before
        if state is None or state.state in {"FATAL", "STOPPED"} or failed_starts >= MAX_FAILED_STARTS:
            reason = f"it keeps ending: {state.detail if state else 'the supervisor is gone'}"
        elif time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        else:
            reason = f"not healthy after {program.deadline_s:.0f} s: {reason}"
        raise ProgramFailed(program.name, _failure(layout, program, reason))


def _failure(layout: Layout, program: Program, reason: str) -> str:
    path = layout.log / f"{program.name}.log"
    lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if path.exists() else []
    tail = "\n".join(f"    {line}" for line in lines) or "    (empty)"
    return f"{program.title} failed: {reason}\n  The end of {path}:\n{tail}\n  What to do: {program.remedy}"


def stop_everything(layout: Layout, order: Iterable[tuple[str, ...]]) -> None:
    """Stop the programs through supervisord if it answers, then whatever else carries the stack's marker."""
    supervisor = Supervisor(layout)
    if supervisor.is_running():
        supervisor.shut_down(order)
    stop_orphans(layout)
    layout.supervisor_socket.unlink(missing_ok=True)
    layout.supervisor_pid.unlink(missing_ok=True)


def stop_orphans(layout: Layout) -> None:
    """End every process of the stack that no supervisor watches any more. Raises ProgramFailed when one stays."""
    remaining = processes.of_stack(layout.stack_id)
    for number in (processes.GRACEFUL, processes.FORCED):
        if not remaining:
            return
        processes.send(remaining, number)
        processes.wait_gone(remaining, ORPHAN_GRACE_S)
        remaining = processes.of_stack(layout.stack_id)
    if remaining:
        raise ProgramFailed("stack", f"These processes do not end: {sorted(remaining)}.")
