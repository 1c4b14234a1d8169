"""Credits bound a stream, over the real ledger: it goes on with what came meanwhile, else ends with what is paid."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2_grpc

from services.billing.domain import DEFAULT_CLASS
from services.billing.ledger.operations import Freeze
from services.chat.app import build
from services.chat.cli import migrate_urls
from services.chat.service.allowance import UNBOUNDED, Allowance
from services.chat.settings import ChatSettings
from shared.errors import PaymentRequired, TollgateError, Unavailable
from shared.grpc import create_server
from shared.identity import HEADER, Identity
from shared.metering import MeteringLimits, Usage
from shared.rpc import inference_pb2_grpc
from shared.telemetry import GrpcMetrics
from shared.web import Readiness
from tests.billing.harness import IDENTITY_KEYS, RING, TERMS, App, Ledger, grant, ledger_on, running
from tests.billing.harness import migrate as migrate_billing
from tests.chat.conftest import asking, serving, until
from tests.chat.doubles import CatalogueDouble, Engine, Item, chunk, listen
from tests.conftest import Components, FreshDatabase, role_url

PATIENT = MeteringLimits(call_timeout_s=60, hold_timeout_s=60, settle_wait_s=60, resolution_timeout_s=60)
WANTED = 40
ENOUGH = 1_000


@dataclass
class Metered:
    """The chat service between an engine that writes when it may, a token a chunk, and billing itself."""

    url: str
    engine: Engine
    ledger: Ledger
    may: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def count_up(self, body: dict[str, Any]) -> AsyncIterator[Item]:
        yield chunk("", 0)
        for n in range(1, body["max_tokens"] + 1):
            await self.may.acquire()
            yield chunk(f"{n} ", n)
        yield chunk("", body["max_tokens"], "length")

    def allow(self, tokens: int) -> None:
        for _ in range(tokens):
            self.may.release()

    async def asked(self, org_id: UUID) -> int:
        """How often a hold of the wallet was to be extended."""
        query = "SELECT count(*) FROM billing.op WHERE tenant = $1 AND kind = 'extend'"
        count: int = await self.ledger.pool.fetchval(query, org_id)
        return count


@pytest.fixture(scope="module")
async def metered(components: Components, fresh_database: FreshDatabase) -> AsyncIterator[Metered]:
    billing_url = await asyncio.to_thread(fresh_database, "billing", migrate=migrate_billing)
    async with AsyncExitStack() as stack:
        ledger = await stack.enter_async_context(ledger_on(billing_url))
        await ledger.prices.bring_up_to_date("small", DEFAULT_CLASS, TERMS, "test")
        billing: App = await stack.enter_async_context(
            running(billing_url, signup_credits="0", billing_operation_timeout_s=60)
        )
        engine, triton = Engine(), aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(engine, triton)
        inference = create_server(RING, GrpcMetrics(CollectorRegistry(), "inference"))
        inference_pb2_grpc.add_CatalogueServicer_to_server(CatalogueDouble(await listen(triton)), inference)
        for server in (triton, inference):
            stack.push_async_callback(server.stop, None)
        owner_url = components.create_database("allowance")
        database_url = role_url(owner_url, "tollgate_chat")
        await asyncio.to_thread(migrate_urls, owner_url, database_url)
        settings = {
            "identity_keys": IDENTITY_KEYS,
            "chat_http_listen": "127.0.0.1:0",
            "billing_grpc": billing.grpc_target,
            "inference_grpc": await listen(inference),
            "chat_database_url": database_url,
            "redis_url": components.redis_url,
            "unleash_url": "http://127.0.0.1:9/api",
            "unleash_token": "none",
            "chat_max_tokens_default": WANTED,
            "chat_first_chunk_timeout_ms": 120_000,
            "chat_count_timeout_ms": 120_000,
            "chat_chunk_timeout_ms": 120_000,
            "chat_settle_wait_ms": 60_000,
        }
        with pytest.MonkeyPatch.context() as patch:  # a slow machine is no ledger that is away
            patch.setattr(ChatSettings, "metering_limits", lambda _: PATIENT)
            service = await build(ChatSettings.model_validate(settings), stack, Readiness())
        tasks = [asyncio.create_task(make()) for make in service.tasks.values()]
        url = await stack.enter_async_context(serving(service.http[0].app))
        async with client(url, uuid4()) as anybody:

            async def has_models() -> bool:
                return (await anybody.get("/v1/models")).status_code == 200

            await until(has_models)
        yield Metered(url, engine, ledger)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def chat(metered: Metered) -> Metered:
    metered.engine.reset()
    metered.may = asyncio.Semaphore(0)
    metered.engine.chat = metered.count_up
    return metered


def client(url: str, org_id: UUID, key_id: UUID | None = None) -> httpx.AsyncClient:
    who = Identity(
        kind="key", org_id=str(org_id), user_id=str(uuid4()), key_id=str(key_id or uuid4()), scopes=("chat", "models")
    )
    return httpx.AsyncClient(base_url=url, headers={HEADER: RING.sign(who)}, timeout=60)


@dataclass
class Told:
    """A stream as it is read: how many tokens came, how it ended, its receipt."""

    tokens: int = 0
    finish_reason: str | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    async def read(self, url: str, org_id: UUID, key_id: UUID | None = None) -> "Told":
        async with client(url, org_id, key_id) as who:
            body = asking(stream=True, stream_options={"include_usage": True})
            async with who.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        return self

    def _take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        for choice in event["choices"]:
            self.tokens += bool(choice["delta"].get("content"))
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.receipt = event.get("tollgate", self.receipt)


async def test_a_stream_that_is_topped_up_goes_on_to_its_own_end(chat: Metered) -> None:
    org_id, told = uuid4(), Told()
    await chat.ledger.writer.submit(grant(org_id, 20))
    reading = asyncio.create_task(told.read(chat.url, org_id))
    chat.allow(20)

    async def used_up() -> bool:
        return told.tokens == 20 and await chat.asked(org_id) == 1

    await until(used_up)  # the question that was asked ahead was refused
    await chat.ledger.writer.submit(grant(org_id, 100))
    chat.allow(ENOUGH)
    await reading
    assert (told.tokens, told.finish_reason, "limited_by" in told.receipt) == (WANTED, "length", False)
    assert (told.receipt["held"], told.receipt["settled"]) == ("0.00000004", "0.00000004")
    wallet = await chat.ledger.wallet(org_id)
    assert (wallet.spent, wallet.available, wallet.held, wallet.receivable) == (WANTED, 80, 0, 0)
    assert [p.get("tg_one_by_one") for p in chat.engine.parameters if "tg_tenant" in p] == [1]
    await chat.ledger.verified()


async def test_a_stream_that_is_not_ends_with_what_is_paid_and_says_why(chat: Metered) -> None:
    org_id = uuid4()
    await chat.ledger.writer.submit(grant(org_id, 20))
    chat.allow(21)  # the last of which is not covered
    told = await Told().read(chat.url, org_id)
    assert (told.tokens, told.finish_reason, told.receipt["limited_by"]) == (20, "length", "credits")
    assert told.receipt["settled"] == told.receipt["held"] == "0.00000002"
    wallet = await chat.ledger.wallet(org_id)
    assert (wallet.spent, wallet.balance, wallet.held, wallet.receivable) == (20, 0, 0, 0)
    await until(chat.engine.is_idle)  # told to stop, or done already
    await chat.ledger.verified()


async def test_credits_that_come_in_time_are_held_ahead_and_nothing_waits(chat: Metered) -> None:
    org_id, told = uuid4(), Told()
    await chat.ledger.writer.submit(grant(org_id, 10))
    reading = asyncio.create_task(told.read(chat.url, org_id))
    chat.allow(7)

    async def began() -> bool:
        return told.tokens == 7

    await until(began)
    await chat.ledger.writer.submit(grant(org_id, 100))
    chat.allow(1)

    async def extended() -> bool:
        return (await chat.ledger.wallet(org_id)).held == WANTED

    await until(extended)  # at eight tokens of ten
    assert told.tokens <= 8
    chat.allow(ENOUGH)
    await reading
    assert (told.tokens, await chat.asked(org_id)) == (WANTED, 1)
    assert (await chat.ledger.wallet(org_id)).spent == WANTED


@pytest.mark.parametrize("reason", ["budget", "frozen"])
async def test_a_budget_or_a_freeze_ends_it_too(chat: Metered, reason: str) -> None:
    org_id, key_id, told = uuid4(), uuid4(), Told()
    await chat.ledger.writer.submit(grant(org_id, 100 if reason == "budget" else 15))
    if reason == "budget":
        await chat.ledger.pool.execute(
            "INSERT INTO billing.budget VALUES ($1, 'key', $2, 'day', 15, clock_timestamp())", org_id, key_id
        )
    reading = asyncio.create_task(told.read(chat.url, org_id, key_id))
    chat.allow(3)

    async def began() -> bool:
        return told.tokens == 3

    await until(began)
    if reason == "frozen":
        await chat.ledger.writer.submit(grant(org_id, 100))
        await chat.ledger.writer.submit(Freeze(org_id, org_id, f"key:{uuid4()}", "user:test", True, "test"))
    chat.allow(ENOUGH)
    await reading
    assert (told.tokens, told.finish_reason, told.receipt["limited_by"]) == (15, "length", reason)
    assert (await chat.ledger.wallet(org_id)).spent == 15


async def test_choices_share_what_there_is(chat: Metered) -> None:
    org_id = uuid4()
    await chat.ledger.writer.submit(grant(org_id, 31))
    chat.allow(ENOUGH)
    async with client(chat.url, org_id) as who:
        answer = (await who.post("/v1/chat/completions", json=asking(n=2))).json()
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    assert (answer["usage"]["completion_tokens"], answer["tollgate"]["limited_by"]) == (31, "credits")
    assert sum(len(c["message"]["content"].split()) for c in answer["choices"]) == 31
    assert (await chat.ledger.wallet(org_id)).balance == 0


async def test_a_limit_of_the_clients_own_is_held_whole_and_never_extended(chat: Metered) -> None:
    org_id = uuid4()
    await chat.ledger.writer.submit(grant(org_id, 20))
    chat.allow(ENOUGH)
    async with client(chat.url, org_id) as who:
        refused = await who.post("/v1/chat/completions", json=asking(max_tokens=21))
        answer = (await who.post("/v1/chat/completions", json=asking(max_tokens=20))).json()
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_quota")
    assert (answer["choices"][0]["finish_reason"], "limited_by" in answer["tollgate"]) == ("length", False)
    assert await chat.asked(org_id) == 0


class Stub:
    """A hold that covers more by the steps of a plan; an error in it is a refusal."""

    id = "hold"

    def __init__(self, covers: int, *plan: int | TollgateError) -> None:
        self.output_tokens, self.usage, self._plan = covers, Usage(), list(plan)
        self.wanted: list[int] = []

    async def extend(self, output_tokens: int) -> int:
        self.wanted.append(output_tokens)
        step = self._plan.pop(0)
        if isinstance(step, TollgateError):
            raise step
        self.output_tokens += step
        return self.output_tokens


async def walked(allowance: Allowance, hold: Stub, most: int) -> int:
    """How far it lets a stream go."""
    for n in range(1, most + 1):
        if n >= allowance.mark and not await allowance.admits(n):
            return n - 1
        hold.usage = Usage(0, 0, n)
        await asyncio.sleep(0)
    return most


async def test_what_is_given_in_small_pieces_is_used_to_the_last() -> None:
    hold = Stub(10, 3, 2, PaymentRequired(), PaymentRequired())
    allowance = Allowance(hold, 100)  # type: ignore[arg-type]
    assert await walked(allowance, hold, 100) == 15
    assert (allowance.limited_by, hold.wanted) == ("credits", [74, 77, 79, 79])


async def test_when_billing_cannot_be_asked_the_stream_ends_and_says_so() -> None:
    hold = Stub(10, Unavailable(), Unavailable())
    allowance = Allowance(hold, 100)  # type: ignore[arg-type]
    assert await walked(allowance, hold, 100) == 10
    assert allowance.limited_by == "billing"


async def test_a_hold_that_covers_everything_is_never_looked_at() -> None:
    assert Allowance(Stub(100), 100).mark == UNBOUNDED  # type: ignore[arg-type]
