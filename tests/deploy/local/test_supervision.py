"""Programs come back, commands find what a dead supervisor left, and nothing stays behind. On PostgreSQL and Valkey."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local import processes, status
from deploy.local.errors import ProgramFailed
from deploy.local.health import wait_healthy
from deploy.local.shutdown import stop_everything
from deploy.local.stack import Stack
from deploy.local.state import Layout
from deploy.local.triton import region_prefix, regions

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def own(state_directory: Path) -> Iterator[Stack]:
    """A stack of this module's own, that it may ill-treat."""
    stack = Stack(Layout(ROOT, state_directory / "ill"), 1, {})
    try:
        yield stack
    finally:
        stack.down()


@pytest.fixture
def running(own: Stack) -> Stack:
    """The same, with its data stores up."""
    if not own.supervisor.is_running():
        stop_everything(own.layout)
        own.start_data_stores()
    return own


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(stack: Stack) -> dict[str, status.Row]:
    programs = [stack.postgres.program(), stack.valkey.program()]
    return {row.name: row for row in status.rows(stack.supervisor, programs)}


@pytest.mark.parametrize("name", ["valkey", "postgres"])
def test_a_killed_program_is_started_again_and_that_shows(running: Stack, name: str) -> None:
    before = rows(running)[name]
    assert before.pid > 0
    os.kill(before.pid, signal.SIGKILL)
    eventually(lambda: rows(running)[name].pid not in {0, before.pid} and rows(running)[name].problem is None)
    after = rows(running)[name]
    assert after.restarts > before.restarts  # a server may find what the killed one left, and need another start
    assert after.memory_bytes > 0
    assert after.state in {"STARTING", "RUNNING"}
    line = status.table([after]).splitlines()[1].split()
    assert line[:4] == [name, after.state.lower(), str(after.pid), str(after.restarts)]


def test_data_outlives_a_stop(running: Stack) -> None:
    running.postgres.execute("CREATE TABLE kept AS SELECT 42 AS n", database="tollgate")
    running.down()
    running.start_data_stores()
    assert running.postgres.execute("SELECT n FROM kept; DROP TABLE kept", database="tollgate") == "42"


def test_down_leaves_nothing(running: Stack) -> None:
    pids = processes.of_stack(running.layout.stack_id)
    assert len(pids) >= 3
    running.down()
    assert processes.of_stack(running.layout.stack_id) == set()
    assert not any(processes.is_alive(pid) for pid in pids)
    assert not running.layout.supervisor_socket.exists()


def test_what_a_killed_supervisor_left_is_found_and_ended(running: Stack) -> None:
    supervisor = running.supervisor.pid()
    assert supervisor is not None
    region = Path("/dev/shm") / f"{region_prefix(running.layout.stack_id)}left"
    region.touch()
    os.kill(supervisor, signal.SIGKILL)
    processes.wait_gone({supervisor}, TIMEOUT_S)
    assert processes.of_stack(running.layout.stack_id)
    running.down()
    assert processes.of_stack(running.layout.stack_id) == set()
    assert regions(running.layout.stack_id) == []


def test_a_program_that_cannot_run_says_why_and_what_to_do(running: Stack) -> None:
    running.supervisor.stop("valkey")
    configuration = running.layout.state / "valkey" / "valkey.conf"
    good = configuration.read_text()
    configuration.write_text(good + "no-such-setting yes\n")
    try:
        running.supervisor.start("valkey")
        with pytest.raises(ProgramFailed) as failure:
            wait_healthy(running.supervisor, running.layout, running.valkey.program())
    finally:
        configuration.write_text(good)
        running.supervisor.stop("valkey")
        running.supervisor.start("valkey")
        eventually(lambda: rows(running)["valkey"].problem is None)
    message = str(failure.value)
    assert failure.value.program == "valkey"
    assert "Valkey 9 failed: it keeps ending" in message
    assert "no-such-setting" in message
    assert "What to do: " in message
