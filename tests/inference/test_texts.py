"""/v1/embeddings and /v1/rerank, with a real engine behind them and a ledger that remembers."""

import base64
import math
import shutil
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from shared.clock import SystemClock
from shared.errors import PaymentRequired
from shared.grpc import create_server
from shared.identity import IdentityRing
from shared.rpc import billing_pb2_grpc
from shared.telemetry import GrpcMetrics
from tests.chat.doubles import Ledger, listen
from tests.inference.client import BackendClient, ModelError, chat
from tests.inference.conftest import RunningTriton, add_build
from tests.inference.gguf_files import write_reranker
from tests.inference.running import CATALOGUE, KEYS, RunningService, running_service

MODEL = """
[models.{name}]
kind = "{name}"
description = "For tests"
created = 1763596800
stable = "{name}-build"
[models.{name}.builds.{name}-build]
engine = "llama.cpp"
quantization = "Q8_0"
context_tokens = 512
slots = 2
residency = "on_demand"
"""
KINDS = ("embedding", "rerank")


@dataclass(frozen=True)
class Desk:
    """The service and the ledger behind it."""

    service: RunningService
    ledger: Ledger

    async def post(self, path: str, _claims: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
        claims = {"kind": "key", "user_id": "u", "org_id": "o", "scopes": ("inference",), **(_claims or {})}
        return await self.service.http.post(path, json=body, headers=self.service.headers(**claims), timeout=60)


@pytest.fixture
async def desk(triton: RunningTriton, repository: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    for kind in KINDS:
        parameters: dict[str, int | str] = {"slots": 2, "context_tokens": 512, "task": kind, "pooling": "mean"}
        add_build(repository, f"{kind}-build", "chat-mini-q8_0", parameters)
    weights = repository / "rerank-build/1/model.gguf"
    weights.unlink()
    write_reranker(weights)
    (repository / "catalogue.toml").write_text(CATALOGUE + "".join(MODEL.format(name=kind) for kind in KINDS))
    ring, ledger = IdentityRing(KEYS, SystemClock()), Ledger()
    billing = create_server(ring, GrpcMetrics(CollectorRegistry(), "billing"))
    billing_pb2_grpc.add_LedgerServicer_to_server(ledger, billing)
    settings = {"BILLING_GRPC": await listen(billing), "INFERENCE_TEXTS_MAX": "8"}
    async with running_service(triton.grpc_address, repository, monkeypatch, **settings) as running:
        yield Desk(running, ledger)
        (repository / "catalogue.toml").write_text(CATALOGUE)
        for kind in KINDS:
            await running.gone(f"{kind}-build")
    await billing.stop(None)
    for kind in KINDS:
        shutil.rmtree(repository / f"{kind}-build")


async def test_texts_become_vectors_and_are_paid_for(desk: Desk) -> None:
    answer = await desk.post("/v1/embeddings", model="embedding", input=["hello there", "limits and keys"])
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    first, second = (entry["embedding"] for entry in body["data"])
    assert len(first) == len(second) == 256
    assert math.hypot(*first) == pytest.approx(1, abs=1e-3)
    assert first != second
    tokens = body["usage"]["prompt_tokens"]
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    (hold,), (settled,) = desk.ledger.holds, desk.ledger.settled
    assert (hold.org_id, hold.model, hold.worst_case.output_tokens) == ("o", "embedding", 0)
    assert hold.worst_case.input_tokens >= tokens > 2
    assert (settled.usage.input_tokens, settled.usage.output_tokens) == (tokens, 0)
    assert body["tollgate"]["build"] == settled.build == "embedding-build"

    encoded = await desk.post("/v1/embeddings", model="embedding", input="hello there", encoding_format="base64")
    vector = struct.unpack("<256f", base64.b64decode(encoded.json()["data"][0]["embedding"]))
    assert vector == pytest.approx(first, abs=1e-3)
    short = await desk.post("/v1/embeddings", model="embedding", input="hello there", dimensions=16)
    cut = short.json()["data"][0]["embedding"]
    assert len(cut) == 16
    assert math.hypot(*cut) == pytest.approx(1, abs=1e-6)
    assert cut[0] / cut[1] == pytest.approx(first[0] / first[1], rel=1e-2)
    assert (await desk.post("/v1/embeddings", model="embedding", input="x", dimensions=999)).status_code == 400


async def test_documents_are_ordered(desk: Desk) -> None:
    documents = ["keys and limits", {"text": "credits"}, "a thing of another kind"]
    for model in KINDS:
        answer = await desk.post("/v1/rerank", model=model, query="credits", documents=documents)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        scores = [result["relevance_score"] for result in results]
        assert scores == sorted(scores, reverse=True)
        assert {result["index"] for result in results} == {0, 1, 2}
        if model == "embedding":
            assert results[0]["index"] == 1
            assert scores[0] == pytest.approx(1, abs=1e-3)
    best = await desk.post(
        "/v1/rerank", model="embedding", query="credits", documents=documents, top_n=1, return_documents=True
    )
    (found,) = best.json()["results"]
    assert found["document"] == {"text": "credits"}
    assert len(desk.ledger.settled) == 3


async def test_what_is_refused_costs_nothing(desk: Desk) -> None:
    async def refused(
        path: str = "/v1/embeddings", claims: dict[str, Any] | None = None, **body: Any
    ) -> tuple[int, str]:
        answer = await desk.post(path, claims, **body)
        error = answer.json()["error"]
        return answer.status_code, error["code"]

    assert await refused(model="nobody", input="x") == (404, "model_not_found")
    assert await refused(model="embedding", input="x", claims={"models": ("other",)}) == (404, "model_not_found")
    assert await refused(model="frail", input="x") == (400, "unsupported_model")
    assert await refused("/v1/rerank", model="frail", query="x", documents=["y"]) == (400, "unsupported_model")
    assert await refused(model="embedding", input=[1, 2, 3]) == (400, "invalid_type")
    assert await refused(model="embedding", input=[]) == (400, "invalid_value")
    assert await refused(model="embedding", input=["x", ""]) == (400, "invalid_value")
    assert await refused(model="embedding", input=["x"] * 9) == (400, "array_above_max_length")
    assert await refused(model="embedding", input="x", claims={"scopes": ("chat",)}) == (403, "insufficient_scope")
    assert await refused(model="embedding", input="word " * 2000) == (400, "context_length_exceeded")
    assert not desk.ledger.settled
    assert await desk.ledger.is_quiet()
    desk.ledger.refusal = PaymentRequired()
    assert await refused(model="embedding", input="x") == (402, "insufficient_quota")


async def test_a_chat_is_refused_by_a_model_for_texts(desk: Desk) -> None:
    assert (await desk.post("/v1/embeddings", model="embedding", input="x")).status_code == 200
    client = BackendClient(desk.service.triton_grpc)
    with pytest.raises(ModelError) as caught:
        await client.send("embedding-build", chat("hello")).all()
    assert caught.value.code == "invalid_request"
    await client.close()
