"""tritonserver under guard: `python -m deploy.local.triton_guard STACK_ID HEALTH_URL COMMAND…`.

It begins with what an earlier server left behind, starts COMMAND, passes SIGTERM and SIGINT on to it, and ends when it
ends, with its status, having cleaned up again; the supervisor then starts both anew. Meanwhile it does what the server
does not do itself:

- A server that has answered HEALTH_URL once and then falls silent for SILENCE_S is killed.
- A build's process (stub) that hangs in the middle of a stream outlives its own replacement for ever: when a younger
  stub of the same build has run for SUPERSEDED_S, longer than any stream may take, the older one is killed.
- The memory of a stub that died in the middle of a stream keeps its name in /dev/shm: it is removed. (The server itself
  lets go of that mebibyte when it ends.)
- Ended stubs are not left as zombies: the server starts with SIGCHLD ignored.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from deploy.local import processes
from deploy.local.triton import STUB, reap, regions

LOOK_INTERVAL_S = 1.0
SWEEP_INTERVAL_S = 5.0
HEALTH_TIMEOUT_S = 5.0
SILENCE_S = float(os.environ.get("TOLLGATE_TRITON_SILENCE_S", "30"))
SUPERSEDED_S = float(os.environ.get("TOLLGATE_TRITON_SUPERSEDED_S", "900"))
ORPHAN_AGE_S = 30.0  # a region exists for a moment before the stub that it is for
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Stub:
    """One live process of a build. `started` is in clock ticks since the machine's start."""

    pid: int
    model: str
    region: str
    started: int


def live_stubs(stack_id: str) -> list[Stub]:
    """The stubs of a stack, from their command lines: program, model file, region, …"""
    found = []
    for pid in processes.of_stack(stack_id):
        if processes.executable(pid) != STUB:
            continue
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
            found.append(Stub(pid, arguments[1], arguments[2], started))
        except (OSError, IndexError, ValueError):
            continue  # it has just ended
    return found


def superseded(stubs: Sequence[Stub], now_ticks: int, after_ticks: int) -> set[int]:
    """The older of two stubs of one build, once the younger has run for `after_ticks`."""
    return {
        old.pid
        for old in stubs
        for young in stubs
        if old.model == young.model and old.started < young.started < now_ticks - after_ticks
    }


def orphans(stack_id: str, stubs: Sequence[Stub], age_s: float) -> list[Path]:
    """Regions that no live stub uses and that are older than `age_s`."""
    used = {stub.region.lstrip("/") for stub in stubs}
    found = []
    for region in regions(stack_id):
        try:
            if region.name not in used and time.time() - region.stat().st_mtime > age_s:
                found.append(region)
        except FileNotFoundError:
            continue
    return found


def sweep(stack_id: str) -> None:
    """Kill hung stubs that have been replaced, and remove what dead ones left."""
    stubs = live_stubs(stack_id)
    ticks = os.sysconf("SC_CLK_TCK")
    now_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * ticks)
    hung = superseded(stubs, now_ticks, int(SUPERSEDED_S * ticks))
    for pid in hung:
        print(f"guard: process {pid} of a build hangs and has been replaced: killed", flush=True)
    processes.send(hung, processes.FORCED)
    for region in orphans(stack_id, stubs, ORPHAN_AGE_S):
        print(f"guard: removed {region}", flush=True)
        region.unlink(missing_ok=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:  # noqa: S310 our own http:// URL
            response.read(1)
    except urllib.error.HTTPError as error:
        error.close()  # it answers, if not what one would like to hear
    except OSError:
        return False
    return True


def _as_child() -> None:
    """In the server, before it is one: it dies with the guard, and its dead children vanish."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def guard(stack_id: str, health_url: str, command: Sequence[str]) -> int:
    """Run the server to its end; its exit status."""
    reap(stack_id)
    server = subprocess.Popen(command, preexec_fn=_as_child)

    def pass_on(number: int, _: FrameType | None) -> None:
        server.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    heard = 0.0  # not before the first answer: loading its libraries takes as long as it takes
    next_sweep = time.monotonic() + SWEEP_INTERVAL_S
    while True:
        try:
            status = server.wait(LOOK_INTERVAL_S)
            break
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if _answers(health_url):
            heard = now
        elif heard and now - heard > SILENCE_S:
            print(f"guard: the server has not answered for {SILENCE_S:g} s: killed", flush=True)
            server.kill()
        if now >= next_sweep:
            sweep(stack_id)
            next_sweep = now + SWEEP_INTERVAL_S
    reap(stack_id)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1], sys.argv[2], sys.argv[3:]))
