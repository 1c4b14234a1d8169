"""Stopping a stack, whatever state it is in, and proving that nothing is left."""

from collections.abc import Iterable

from deploy.local import processes, triton
from deploy.local.errors import LaunchError
from deploy.local.state import Layout
from deploy.local.supervisor import Supervisor

ORPHAN_GRACE_S = 10.0
# Front to back: nobody loses a dependency while it still finishes a request.
STOP_ORDER: tuple[tuple[str, ...], ...] = (
    ("gateway",),
    ("chat",),
    ("auth", "billing", "inference"),
    ("triton", "unleash", "valkey"),
    ("postgres",),
)


def stop_everything(layout: Layout, order: Iterable[tuple[str, ...]] = STOP_ORDER) -> None:
    """Stop the programs through supervisord if it answers, then whatever else carries the stack's marker.

    Raises LaunchError when a process or a shared memory region stays.
    """
    supervisor = Supervisor(layout)
    if supervisor.is_running():
        supervisor.shut_down(order)
    stop_orphans(layout)
    triton.reap(layout.stack_id)
    layout.supervisor_socket.unlink(missing_ok=True)
    layout.supervisor_pid.unlink(missing_ok=True)
    if left := triton.regions(layout.stack_id):
        raise LaunchError(f"Shared memory stays behind: {', '.join(map(str, left))}.")


def stop_orphans(layout: Layout) -> None:
    """End every process of the stack that no supervisor watches (any more).

    Raises LaunchError when one stays.
    """
    remaining = processes.of_stack(layout.stack_id)
    for number in (processes.GRACEFUL, processes.FORCED):
        if not remaining:
            return
        processes.send(remaining, number)
        processes.wait_gone(remaining, ORPHAN_GRACE_S)
        remaining = processes.of_stack(layout.stack_id)
    if remaining:
        raise LaunchError(f"These processes do not end: {', '.join(map(str, sorted(remaining)))}.")
