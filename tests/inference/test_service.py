"""The inference service over a real tritonserver: builds are loaded, watched, and come back."""

import asyncio
import os
import shutil
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from services.inference.app import build
from services.inference.canary import Canary, Patience
from services.inference.domain import Build
from services.inference.errors import BuildDead, CatalogueInvalid
from services.inference.repository import DesiredFile
from services.inference.service import Models
from services.inference.settings import Settings
from services.inference.triton import TritonServer
from shared.clock import SystemClock
from shared.rpc import inference_pb2, inference_pb2_grpc
from shared.telemetry import InferenceMetrics
from shared.web import Readiness
from tests.inference.client import BackendClient, chat
from tests.inference.conftest import RunningTriton, add_build
from tests.inference.running import CATALOGUE, MORE, READY, WAIT_S, RunningService


async def test_the_catalogue_s_builds_are_loaded_and_listed(
    service: RunningService, triton: RunningTriton, client: BackendClient
) -> None:
    found = await service.ready()
    assert found.triton_model == "frail"
    assert found.triton_target == triton.grpc_address
    assert (found.context_tokens, found.slots, found.quantization, found.reason) == (1024, 2, "Q8_0", "")
    (model,) = (await service.list()).models
    assert (model.alias, model.stable_build, model.kind) == ("frail", "frail", "chat")
    assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3
    assert (await service.readiness.report())[0]


async def test_a_killed_stub_is_noticed_and_replaced(
    service: RunningService, triton: RunningTriton, client: BackendClient
) -> None:
    await service.ready()
    before = triton.stub("frail")
    listed = await service.list()
    service.seen.clear()
    triton.kill_stub("frail")
    await service.unavailable()
    await service.ready()
    assert triton.stub("frail") != before
    now = await service.list()
    assert now.revision > listed.revision
    assert losses(now)["frail"] > losses(listed)["frail"]
    assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3


def losses(listed: inference_pb2.ListReply) -> dict[str, int]:
    """When each build last failed, by name."""
    return {build.name: build.lost_at_ms for model in listed.models for build in model.builds}


async def test_a_stub_killed_in_mid_stream_is_replaced_too(
    service: RunningService, triton: RunningTriton, client: BackendClient
) -> None:
    await service.ready()
    streams = [client.send("frail", chat(tokens=900)) for _ in range(4)]
    await streams[0].first(2)
    triton.kill_stub("frail")
    # Once in a while tritonserver aborts on the lock that the dead process held.
    supervised = asyncio.create_task(_supervise(triton))
    await service.unavailable()
    await service.ready()
    supervised.cancel()
    assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3
    for stream in streams:
        stream.cancel()


async def _supervise(triton: RunningTriton) -> None:
    while True:
        await asyncio.to_thread(triton.supervise)
        await asyncio.sleep(0.1)


async def test_a_process_that_dies_over_a_probe_is_known_to_be_dead(
    triton: RunningTriton, backend: BackendClient
) -> None:
    """Long before the time for a probe is over."""
    await backend.load("frail")
    server = TritonServer(triton.grpc_address, control_timeout_s=WAIT_S, load_timeout_s=WAIT_S)
    patience = Patience(canary_s=3, first_token_s=WAIT_S, reload_quiet_s=0, probe_s=WAIT_S)
    canary = Canary(server, InferenceMetrics(CollectorRegistry()), patience)
    frail = Build("frail", "llama.cpp", "Q8_0", context_tokens=1024, slots=2, parameters=0)
    process = triton.stub("frail")
    os.kill(process, signal.SIGSTOP)
    checking = asyncio.create_task(canary.check(frail))
    done, _ = await asyncio.wait({checking}, timeout=1)
    assert not done
    os.kill(process, signal.SIGKILL)
    with pytest.raises(BuildDead):
        await checking
    await server.close()
    (triton.server.repository / "frail/1/model.py").touch()
    await backend.load("frail")
    assert (await backend.send("frail", chat(tokens=2)).all())[-1]["usage"]["completion_tokens"] == 2


async def test_after_a_restart_of_triton_the_builds_are_loaded_again(
    service: RunningService, triton: RunningTriton, client: BackendClient
) -> None:
    await service.ready()
    assert triton.process is not None
    triton.process.kill()
    triton.process.wait()
    await service.unavailable(reason="Triton does not answer.")
    await asyncio.to_thread(triton.start)
    await service.ready()
    assert (await client.send("frail", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3


async def test_several_replicas_load_one_build_once(
    service: RunningService, triton: RunningTriton, repository: Path
) -> None:
    await service.ready()
    stub = triton.stub("frail")
    async with AsyncExitStack() as stack:
        other = await build(Settings(), stack, Readiness())
        task = asyncio.create_task(other.tasks["watcher"]())
        await asyncio.sleep(0)
        revision = (await service.list()).revision
        await service.ready()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert triton.stub("frail") == stub
    assert (await service.list()).revision == revision


async def test_the_catalogue_file_is_followed(service: RunningService, repository: Path, client: BackendClient) -> None:
    await service.ready()
    add_build(repository, "late", "chat-mini-q8_0", {"slots": 2})
    revision = (await service.list()).revision
    service.catalogue.write_text(CATALOGUE + MORE.format(name="late", context_tokens=1024))
    await service.ready("late")
    assert (await service.list()).revision > revision
    service.catalogue.write_text(CATALOGUE)
    deadline = time.monotonic() + WAIT_S
    while "late" in await service.builds() or await client.is_ready("late"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert 'build_ready{build="late"' not in (await service.http.get("/metrics")).text
    shutil.rmtree(repository / "late")
    assert (await service.ready()).state == READY


async def test_a_broken_catalogue_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "catalogue.toml").write_text(CATALOGUE)
    triton = TritonServer("127.0.0.1:1", control_timeout_s=1, load_timeout_s=1)
    metrics = InferenceMetrics(CollectorRegistry())
    patience = Patience(canary_s=1, first_token_s=1, reload_quiet_s=1)
    models = Models(tmp_path, triton, metrics, SystemClock(), patience, DesiredFile(tmp_path / "desired.json"))
    before = models.snapshot()
    (tmp_path / "catalogue.toml").write_text("not a catalogue")
    with pytest.raises(CatalogueInvalid, match="not valid TOML"):
        models.reread()
    assert not models.reread()  # it complains once
    assert models.snapshot() == before
    (tmp_path / "catalogue.toml").unlink()
    with pytest.raises(CatalogueInvalid, match="cannot read"):
        models.reread()
    await triton.close()


async def test_a_build_that_cannot_be_loaded_says_why_and_the_others_serve(
    service: RunningService, repository: Path
) -> None:
    add_build(repository, "broken", "chat-mini-q8_0", {"slots": 2})
    weights = repository / "broken" / "1" / "model.gguf"
    weights.unlink()
    weights.write_bytes(b"GGUF, or so it says")
    service.catalogue.write_text(CATALOGUE + MORE.format(name="broken", context_tokens=1024))
    found = await service.unavailable("broken", reason="Loading failed")
    assert "\n" not in found.reason
    assert (await service.ready()).state == READY
    shutil.rmtree(repository / "broken")


async def test_a_catalogue_that_contradicts_the_configuration_makes_the_build_unavailable(
    service: RunningService, repository: Path, client: BackendClient
) -> None:
    add_build(repository, "liar", "chat-mini-q8_0", {"slots": 2})
    service.catalogue.write_text(CATALOGUE + MORE.format(name="liar", context_tokens=512))
    found = await service.unavailable("liar", reason="context_tokens")
    assert found.reason == "context_tokens is 512 in the catalogue and 1024 in config.pbtxt."
    service.catalogue.write_text(CATALOGUE + MORE.format(name="liar", context_tokens=1024))
    await service.ready("liar")
    service.catalogue.write_text(CATALOGUE)
    deadline = time.monotonic() + WAIT_S
    while await client.is_ready("liar"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    shutil.rmtree(repository / "liar")


async def test_the_operator_s_list_is_for_administrators_and_operators(service: RunningService) -> None:
    await service.ready()
    path = "/api/v1/admin/inference/models"
    assert (await service.http.get(path)).status_code == 401
    user = service.headers(kind="user", user_id="u", org_id="o", roles=("user",))
    refused = await service.http.get(path, headers=user)
    assert refused.status_code == 403
    assert refused.json()["code"] == "insufficient_role"
    key = service.headers(kind="key", user_id="u", org_id="o", roles=("admin",), scopes=("chat",))
    assert (await service.http.get(path, headers=key)).status_code == 403
    for role in ("admin", "operator"):
        headers = service.headers(kind="user", user_id="u", org_id="o", roles=(role,))
        answer = await service.http.get(path, headers=headers)
        assert answer.status_code == 200
    (model,) = answer.json()["models"]
    (found,) = model["builds"]
    assert (found["name"], found["state"], found["reason"], found["stable"]) == ("frail", "ready", "", True)


async def test_the_catalogue_answers_to_services_only(service: RunningService) -> None:
    async with aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stub = inference_pb2_grpc.CatalogueStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.List(inference_pb2.ListRequest(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_metrics_show_the_builds(service: RunningService) -> None:
    await service.ready()
    text = (await service.http.get("/metrics")).text
    assert 'tollgate_inference_build_ready{build="frail",model="frail"} 1.0' in text
