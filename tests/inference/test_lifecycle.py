"""Builds come and go: on demand, by an operator's word, by version, and only where there is room."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.inference import memory
from services.inference.canary import Patience
from services.inference.domain import Build, BuildState, Wanted
from services.inference.errors import LoadFailed
from services.inference.memory import Memory, needed_bytes
from services.inference.repository import Desired, DesiredFile
from services.inference.service import Models
from services.inference.triton import TritonServer
from shared.clock import SystemClock
from shared.errors import TollgateError
from shared.rpc import inference_pb2
from shared.telemetry import InferenceMetrics
from tests.inference.client import BackendClient, chat
from tests.inference.conftest import MODELS, RunningTriton, add_build
from tests.inference.running import CATALOGUE, MORE, READY, WAIT_S, RunningService, running_service

UNLOADED = inference_pb2.BUILD_STATE_UNLOADED
ON_DEMAND = MORE + 'residency = "on_demand"\n'
NAMES = ("lazy", "lazier")
ADMIN = "/api/v1/admin/inference/builds"


@asynccontextmanager
async def with_builds_on_demand(
    triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch, **settings: str
) -> AsyncIterator[RunningService]:
    """`frail` always, `lazy` and `lazier` on demand."""
    for name in NAMES:
        add_build(repository, name, "chat-mini-q8_0", {"slots": 2})
    entries = "".join(ON_DEMAND.format(name=name, context_tokens=1024) for name in NAMES)
    (repository / "catalogue.toml").write_text(CATALOGUE + entries)
    try:
        async with running_service(triton.grpc_address, repository, monkeypatch, **settings) as running:
            try:
                yield running
            finally:
                (repository / "catalogue.toml").write_text(CATALOGUE)
                for name in NAMES:
                    await running.gone(name)
    finally:
        (repository / "desired.json").unlink(missing_ok=True)
        for name in NAMES:
            shutil.rmtree(repository / name)


@pytest.fixture
async def lazy(
    triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningService]:
    """Two builds at most are loaded; who is not used is unloaded soon."""
    settings = {"INFERENCE_IDLE_UNLOAD_MS": "1500", "INFERENCE_LOADED_BUILDS_MAX": "2"}
    async with with_builds_on_demand(triton, repository, monkeypatch, **settings) as service:
        yield service


async def ensure(service: RunningService, name: str, wait_ms: int = 60_000) -> inference_pb2.Build:
    found = await service.rpc("Ensure", inference_pb2.EnsureRequest(build=name, wait_ms=wait_ms))
    assert isinstance(found, inference_pb2.Build)
    return found


async def test_a_build_on_demand_is_loaded_when_asked_for_and_unloaded_when_idle(
    lazy: RunningService, client: BackendClient
) -> None:
    found = await lazy.until("lazy", lambda b: b.state == UNLOADED)
    assert found.on_demand
    assert not await client.is_ready("lazy")
    assert (await ensure(lazy, "lazy")).state == READY
    assert (await client.send("lazy", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3
    await lazy.until("lazy", lambda b: b.state == UNLOADED)
    assert (await lazy.ready("frail")).state == READY


async def test_use_keeps_a_build_on_demand(lazy: RunningService, client: BackendClient) -> None:
    await ensure(lazy, "lazy")
    lazy.seen.clear()
    for _ in range(12):  # twice as long as it may be idle
        await client.send("lazy", chat(tokens=3)).all()
        assert (await lazy.builds())["lazy"].state == READY
        await asyncio.sleep(0.25)


async def test_a_wait_is_bounded_and_an_unknown_build_is_named(lazy: RunningService) -> None:
    await lazy.until("lazy", lambda b: b.state == UNLOADED)
    assert (await ensure(lazy, "lazy", wait_ms=0)).state != READY
    with pytest.raises(TollgateError) as caught:
        await ensure(lazy, "nobody")
    assert (caught.value.status, caught.value.code) == (404, "build_not_found")
    assert (await ensure(lazy, "lazy")).state == READY


async def test_the_least_recently_used_makes_room(lazy: RunningService) -> None:
    await lazy.ready("frail")
    await ensure(lazy, "lazy")
    assert (await ensure(lazy, "lazier")).state == READY
    assert (await lazy.builds())["lazy"].state == UNLOADED


async def test_a_memory_that_fills_up_unloads_the_least_recently_used(
    triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 85 % in use; only what is on demand, which nothing else unloads within ten minutes."""
    async with with_builds_on_demand(triton, repository, monkeypatch) as service:
        await service.ready("frail")
        for name in NAMES:
            assert (await ensure(service, name)).state == READY
        full = iter([Memory(total=1000, available=149)])
        monkeypatch.setattr(memory, "machine_memory", lambda: next(full, Memory(total=1000, available=150)))
        await service.until("lazy", lambda b: b.state == UNLOADED)
        for name in ("frail", "lazier"):
            assert (await service.builds())[name].state == READY


async def test_a_build_that_makes_room_while_it_is_looked_at_stays_away(
    triton: RunningTriton, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: BackendClient
) -> None:
    """Its silence is no death that would have it loaded again, and its use before no wish for it."""
    add_build(repository, "lazy", "chat-mini-q8_0", {"slots": 2})
    (repository / "catalogue.toml").write_text(CATALOGUE + ON_DEMAND.format(name="lazy", context_tokens=1024))
    server = TritonServer(triton.grpc_address, control_timeout_s=WAIT_S, load_timeout_s=WAIT_S)
    patience = Patience(canary_s=WAIT_S, first_token_s=WAIT_S, reload_quiet_s=0)
    metrics, desired = InferenceMetrics(CollectorRegistry()), DesiredFile(tmp_path / "desired.json")
    models = Models(repository, server, metrics, SystemClock(), patience, desired)
    lazy = models.snapshot().catalogue.builds["lazy"]
    await models.ensure("lazy", 0)
    await models.tend(lazy)
    assert models.is_ready("lazy")
    process = triton.stub("lazy")
    os.kill(process, signal.SIGSTOP)
    looking = asyncio.create_task(models.tend(lazy))
    await asyncio.wait({looking}, timeout=0.5)  # most likely it waits for an answer now
    monkeypatch.setattr(memory, "machine_memory", lambda: Memory(total=1000, available=149))
    await models.relieve()
    os.kill(process, signal.SIGCONT)
    await looking
    for _ in range(2):
        assert models.snapshot().statuses["lazy"].state is BuildState.UNLOADED
        await models.tend(lazy)
    await server.close()
    deadline = time.monotonic() + WAIT_S
    while await client.is_ready("lazy"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    (repository / "catalogue.toml").write_text(CATALOGUE)
    shutil.rmtree(repository / "lazy")


async def test_an_operator_s_word_outlives_the_service(
    lazy: RunningService, triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lazy.ready("frail")
    answer = await lazy.http.post(f"{ADMIN}/frail/unload", headers=lazy.operator())
    assert answer.status_code == 200
    await lazy.until("frail", lambda b: b.state == UNLOADED and "operator" in b.reason)
    assert (await lazy.http.get("/readyz")).status_code == 503
    async with running_service(triton.grpc_address, repository, monkeypatch) as other:
        await other.until("frail", lambda b: b.state == UNLOADED)
        assert (await ensure(other, "frail", 500)).state == UNLOADED
    answer = await lazy.http.post(f"{ADMIN}/frail/load", json={"wait_ms": 60_000}, headers=lazy.operator())
    assert answer.json()["state"] == "ready"
    assert (await lazy.http.post(f"{ADMIN}/frail/auto", headers=lazy.operator())).status_code == 200
    assert (await lazy.http.post(f"{ADMIN}/nobody/unload", headers=lazy.operator())).status_code == 404
    user = lazy.headers(kind="user", user_id="u", org_id="o", roles=("user",))
    for verb in ("load", "unload", "auto", "reload"):
        assert (await lazy.http.post(f"{ADMIN}/frail/{verb}", headers=user)).status_code == 403


async def test_a_reload_lets_streams_finish(
    service: RunningService, triton: RunningTriton, client: BackendClient
) -> None:
    await service.ready()
    before = triton.stub("frail")
    lost_at_ms = (await service.ready()).lost_at_ms
    stream = client.send("frail", chat(tokens=700))
    await stream.first(1)
    request = inference_pb2.ControlRequest(build="frail", action=inference_pb2.ACTION_RELOAD)
    await service.rpc("Control", request)
    assert (await service.ready()).lost_at_ms == lost_at_ms  # who waits there waits on
    assert (await stream.all())[-1]["usage"]["completion_tokens"] == 700
    assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3
    assert triton.stub("frail") != before


async def test_a_version_can_be_pinned(
    service: RunningService, triton: RunningTriton, repository: Path, client: BackendClient
) -> None:
    await service.ready()
    shutil.copytree(repository / "frail/1", repository / "frail/2", symlinks=True)
    try:
        await service.http.post(f"{ADMIN}/frail/reload", headers=service.operator())
        await service.ready()
        assert triton.version("frail") == "2"  # the highest
        answer = await service.http.put(f"{ADMIN}/frail/version", json={"version": "1"}, headers=service.operator())
        assert answer.json()["version"] == "1"
        found = await service.ready()
        assert found.triton_version == "1"
        assert triton.version("frail") == "1"
        assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3
        for wrong in ("3", "../..", "²"):
            answer = await service.http.put(
                f"{ADMIN}/frail/version", json={"version": wrong}, headers=service.operator()
            )
            assert answer.status_code == 422
    finally:
        await service.http.put(f"{ADMIN}/frail/version", json={"version": None}, headers=service.operator())
        shutil.rmtree(repository / "frail/2")
        (repository / "desired.json").unlink(missing_ok=True)
        await service.http.post(f"{ADMIN}/frail/reload", headers=service.operator())


async def test_what_does_not_fit_is_not_loaded(
    triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch, client: BackendClient
) -> None:
    (repository / "catalogue.toml").write_text(CATALOGUE)
    await client.unload("frail")
    settings = {"INFERENCE_MEMORY_SHARE_MAX": "0.0001"}
    async with running_service(triton.grpc_address, repository, monkeypatch, **settings) as service:
        found = await service.unavailable(reason="of memory, and 0 MiB are left of the 0% that may be in use")
        assert found.reason.startswith("Loading failed: it needs 10")


def test_needed_memory_is_weights_and_cache(tmp_path: Path) -> None:
    weights = MODELS / "chat-mini-q8_0/1/model.gguf"
    build = Build("b", "llama.cpp", "Q8_0", context_tokens=1000, slots=4, parameters=0)
    assert needed_bytes(weights, build) == weights.stat().st_size + 2048 * 1000 * 4 + memory.PROCESS_BYTES
    with pytest.raises(LoadFailed, match="cannot read"):
        needed_bytes(tmp_path / "none.gguf", build)


def test_room_is_what_is_left_of_the_share() -> None:
    assert Memory(total=1000, available=400).room(0.85) == 250
    assert Memory(total=1000, available=100).room(0.85) == -50
    assert memory.machine_memory().total > 0


def test_the_file_of_wishes(tmp_path: Path) -> None:
    file, other = DesiredFile(tmp_path / "d.json"), DesiredFile(tmp_path / "d.json")
    assert file.of("a") == Desired()
    file.change("a", wanted=Wanted.UNLOADED)
    assert other.change("b", version="2") == Desired(version="2")
    assert file.of("a").wanted is Wanted.UNLOADED
    assert file.of("b").version == "2"
    other.change("b", version=None)
    assert "b" not in (tmp_path / "d.json").read_text()
    (tmp_path / "d.json").write_text("[broken")
    assert file.of("a") == Desired()
