"""`make up` as a stranger meets it: what it prints works, what it starts is private and comes back."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.local import processes, triton
from deploy.local.stack import SERVICES
from tests.running_stack import RunningStack

ROOT = Path(__file__).parents[3]
COMMAND_TIMEOUT_S = 120
DEV_ENV = """
TOLLGATE_URL TOLLGATE_API_KEY TOLLGATE_ADMIN_TOKEN TOLLGATE_DATABASE_URL TOLLGATE_REDIS_URL
UNLEASH_URL UNLEASH_ADMIN_TOKEN UNLEASH_USER UNLEASH_PASSWORD TRITON_GRPC_URL TRITON_METRICS_URL
TOLLGATE_AUTH_HTTP_URL TOLLGATE_BILLING_HTTP_URL TOLLGATE_CHAT_HTTP_URL TOLLGATE_INFERENCE_HTTP_URL
TOLLGATE_GATEWAY_HTTP_URL TOLLGATE_BILLING_GRPC TOLLGATE_INFERENCE_GRPC
"""

pytestmark = pytest.mark.journey


def make(stack: RunningStack, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the launcher on the running stack, as the Makefile gives it."""
    state = {"TOLLGATE_STATE": str(stack.stack.layout.state)}
    return subprocess.run(
        (sys.executable, "-m", "deploy.local.cli", *arguments),
        cwd=ROOT,
        env={**os.environ, **state, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def between(text: str, first: str) -> str:
    """The paragraph of `text` that begins with `first`."""
    return first + text.partition(f"\n{first}")[2].partition("\n\n")[0]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def mapped_by_stubs(stack_id: str) -> set[Path]:
    """The shared memory that a running stub of the stack has mapped."""
    mapped = set()
    for pid in processes.of_stack(stack_id):
        if processes.executable(pid) == triton.STUB:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                mapped.add(Path(line.rpartition(" ")[2]))
    return mapped & set(triton.regions(stack_id))


def test_up_again_changes_nothing_and_prints_the_same(stack: RunningStack) -> None:
    stack.wait_healthy()  # a test before this one may have killed something
    pids = {name: stack.pid(name) for name in SERVICES}
    again = make(stack, "up")
    assert again.returncode == 0, again.stderr
    assert "Everything runs already." in again.stdout
    assert stack.api_key in again.stdout
    assert {name: stack.pid(name) for name in SERVICES} == pids


def test_up_waits_for_a_program_that_is_only_slow(stack: RunningStack) -> None:
    stack.wait_healthy()
    pid = stack.pid("auth")
    command = (sys.executable, "-u", "-m", "deploy.local.cli", "up")
    state = {"TOLLGATE_STATE": str(stack.stack.layout.state)}
    os.kill(pid, signal.SIGSTOP)
    try:
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **state}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as again:
            assert again.stdout is not None
            first = again.stdout.readline()
            os.kill(pid, signal.SIGCONT)
            rest, _ = again.communicate(timeout=COMMAND_TIMEOUT_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "PostgreSQL" in first
    assert again.returncode == 0
    assert "Everything runs already." in rest
    assert stack.pid("auth") == pid


def test_up_on_another_port_is_refused_while_it_runs(stack: RunningStack) -> None:
    refused = make(stack, "up", TOLLGATE_PORT="8099")
    assert refused.returncode == 1
    assert "make down, then make up TOLLGATE_PORT=8099" in refused.stderr


def test_the_printed_curl_streams(stack: RunningStack) -> None:
    command = between(make(stack, "up").stdout, "curl ")
    result = subprocess.run(
        ("bash", "-c", command), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
    )
    events = [line for line in result.stdout.splitlines() if line.startswith("data: ")]
    assert len(events) > 3
    assert events[-1] == "data: [DONE]"


def test_the_printed_snippet_answers(stack: RunningStack) -> None:
    snippet = between(make(stack, "up").stdout, "from openai ")
    assert snippet.count("\n") == 3
    result = subprocess.run(
        (sys.executable, "-c", snippet), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
    )
    assert result.stdout.strip()


def test_everything_is_ready_and_nothing_degraded(stack: RunningStack) -> None:
    def is_whole() -> bool:
        answer = httpx.get(f"{stack.url}/readyz", timeout=COMMAND_TIMEOUT_S)
        return answer.status_code == 200 and set(answer.json()["checks"].values()) == {"ok"}

    # A service that a test before this one killed is probed, and taken back, every few seconds.
    eventually(is_whole)


def test_dev_env_is_private_and_complete(stack: RunningStack) -> None:
    path = stack.stack.layout.dev_env
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shell = f"set -eu; set -a; . {path}; env"
    result = subprocess.run(("sh", "-c", shell), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    values = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    assert {name: values[name] for name in stack.env} == stack.env
    assert set(DEV_ENV.split()) <= set(values)


def test_every_socket_is_bound_to_this_machine(stack: RunningStack) -> None:
    listening = set()
    for pid in processes.of_stack(stack.stack.layout.stack_id):
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.add(connection.laddr)
    # gRPC binds IPv4 addresses through an IPv6 socket.
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} >= set(stack.stack.ports.values())


def test_no_secret_is_a_command_line_argument(stack: RunningStack) -> None:
    secrets = set(stack.stack.secrets.values()) | {stack.api_key, stack.admin_token}
    for pid in processes.of_stack(stack.stack.layout.stack_id):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        assert not any(secret in line for secret in secrets)


@pytest.mark.parametrize("program", ["billing", "gateway"])
def test_a_killed_service_is_restarted_and_status_shows_it(stack: RunningStack, program: str) -> None:
    before = stack.restarts(program)
    stack.wait_restarted(program, stack.kill(program))
    stack.wait_healthy()
    shown = make(stack, "status")
    line = next(line for line in shown.stdout.splitlines() if line.startswith(program))
    restarts = stack.restarts(program)
    assert restarts > before
    assert re.match(rf"{program} +(running|starting) +{stack.pid(program)} +{restarts} ", line)
    assert shown.returncode == 0, shown.stdout


def test_a_killed_triton_leaves_no_stub_and_no_memory_behind(stack: RunningStack) -> None:
    stack_id = stack.stack.layout.stack_id
    regions = set(triton.regions(stack_id))
    stubs = {pid for pid in processes.of_stack(stack_id) if processes.executable(pid) == triton.STUB}
    assert regions
    assert stubs
    stack.wait_restarted("triton", stack.kill("triton"))
    stack.wait_healthy()
    assert processes.wait_gone(stubs, COMMAND_TIMEOUT_S) == set()
    eventually(lambda: not regions & set(triton.regions(stack_id)))
    # What is there now is used: a stub that a test before this one killed has left nothing either.
    eventually(lambda: set(triton.regions(stack_id)) == mapped_by_stubs(stack_id) != set())


def test_logs_show_one_program_or_all(stack: RunningStack) -> None:
    one = make(stack, "logs", "gateway").stdout.splitlines()
    assert one
    assert all(line.startswith("gateway | ") for line in one)
    every = {line.split(" | ")[0].strip() for line in make(stack, "logs").stdout.splitlines()}
    assert every >= {*SERVICES, "postgres", "valkey", "triton", "supervisord"}
