"""What tritonserver does not do itself: it is killed when it hangs, and so are hung processes of builds."""

import asyncio
import os
import signal
import time

from deploy.local import processes
from deploy.local.triton import SERVER, SHARED_MEMORY, region_prefix, regions
from deploy.local.triton_guard import Stub, live_stubs, orphans, superseded
from tests.inference.client import BackendClient, chat
from tests.inference.conftest import RunningTriton
from tests.inference.test_backend import eventually

AT, AFTER = 1000, 100


def test_only_the_older_of_two_is_superseded_and_only_after_a_while() -> None:
    old, young, other = Stub(1, "a", "r1", 10), Stub(2, "a", "r2", 500), Stub(3, "b", "r3", 5)
    assert superseded([old, young, other], AT, AFTER) == {1}
    assert superseded([old, young, other], 550, AFTER) == set()
    assert superseded([young, other], AT, AFTER) == set()


def test_memory_without_a_process_is_found() -> None:
    path = SHARED_MEMORY / f"{region_prefix('guardtest')}one"
    path.touch()
    try:
        assert orphans("guardtest", [], 0) == [path]
        assert orphans("guardtest", [], 3600) == []
        assert orphans("guardtest", [Stub(1, "m", f"/{path.name}", 0)], 0) == []
    finally:
        path.unlink()


async def test_a_hung_process_that_has_been_replaced_is_killed(triton: RunningTriton, backend: BackendClient) -> None:
    await backend.load("frail")
    hung = triton.stub("frail")
    stream = backend.send("frail", chat(tokens=900))
    await stream.first(1)
    os.kill(hung, signal.SIGSTOP)
    (triton.server.repository / "frail/1/model.py").touch()
    config = triton.server.repository / "frail/config.pbtxt"
    config.write_text(config.read_text())
    await backend.load("frail")
    assert (await backend.send("frail", chat(tokens=2)).all())[-1]["usage"]["completion_tokens"] == 2
    await eventually(lambda: not processes.is_alive(hung), "the hung process is still there")
    stubs = {stub.pid for stub in live_stubs(triton.server.layout.stack_id)}
    assert triton.stub("frail") in stubs
    assert hung not in stubs
    stream.cancel()


async def test_a_server_that_hangs_is_killed_and_started_again(triton: RunningTriton, backend: BackendClient) -> None:
    stack_id = triton.server.layout.stack_id
    (server,) = (pid for pid in processes.of_stack(stack_id) if processes.executable(pid) == SERVER)
    os.kill(server, signal.SIGSTOP)
    assert triton.process is not None
    deadline = time.monotonic() + 120
    while triton.process.poll() is None:
        assert time.monotonic() < deadline, "the server hangs on"
        await asyncio.sleep(0.05)
    assert triton.process.returncode == 128 + signal.SIGKILL
    assert regions(stack_id) == []
    await asyncio.to_thread(triton.supervise)
    await backend.load("frail")
    assert (await backend.send("frail", chat(tokens=2)).all())[-1]["usage"]["completion_tokens"] == 2
