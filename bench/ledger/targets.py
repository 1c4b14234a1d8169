"""What is loaded: the kernel alone, the writer with its database in this process, billing over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import UUID

from prometheus_client import CollectorRegistry

from bench.ledger.load import Pair
from bench.ledger.server import MODEL, TERMS, identity_ring
from services.billing.clients import GrpcPeers
from services.billing.collector import collect_seldom
from services.billing.domain import DEFAULT_CLASS, Price, Usage
from services.billing.ledger import kernel
from services.billing.ledger.batch import Ids
from services.billing.ledger.book import Book, Journal
from services.billing.ledger.operations import GrantCredits, PlaceHold, Settle
from services.billing.ledger.shards import ShardLimits, Shards
from services.billing.ledger.writer import WriterLimits
from services.billing.repository.database import Database, DatabaseLimits
from shared import metering
from shared.grpc import Caller
from shared.identity import Identity
from shared.ids import uuid7
from shared.metering import Metering, MeteringLimits
from shared.telemetry import BillingMetrics

INPUT_TOKENS, MAX_TOKENS, USED_TOKENS = 100, 200, 150
TTL_MS = 60_000
GRANT_NANO = 10**15
PATIENCE_S = 60.0
KERNEL_ROUND = 100
WALLETS_IN_MEMORY = 100_000  # the service's TOLLGATE_BILLING_WALLETS_IN_MEMORY_MAX


def kernel_pairs_per_s(seconds: float) -> float:
    """Holds and settlements of the kernel on a book in memory: pairs a second on one core."""
    prices = {(MODEL, DEFAULT_CLASS): [Price(uuid7(), MODEL, DEFAULT_CLASS, TERMS, datetime.now(UTC))]}
    ids = Ids()
    journal, book = Journal(datetime.now(UTC), ids, prices, ids()), Book(uuid7())
    book.open(journal)
    kernel.decide(
        journal,
        book,
        GrantCredits(
            book.wallet_id, book.wallet_id, "bench", "bench", uuid7(), GRANT_NANO, "manual", "bench", 100, None
        ),
    )
    user, pairs = uuid7(), 0
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        journal = Journal(datetime.now(UTC), ids, prices, ids())
        for _ in range(KERNEL_ROUND):
            hold = place(book.wallet_id, user)
            kernel.decide(journal, book, hold)
            kernel.decide(journal, book, settlement(hold))
        book.written(book.ending())
        pairs += KERNEL_ROUND
    return pairs / (time.perf_counter() - began_s)


def place(wallet_id: UUID, user_id: UUID) -> PlaceHold:
    """A hold of a chat request."""
    return PlaceHold(
        wallet_id,
        uuid7(),
        user_id,
        None,
        "default",
        MODEL,
        Usage(INPUT_TOKENS, 0, MAX_TOKENS),
        False,
        TTL_MS,
        "req_bench",
    )


def settlement(hold: PlaceHold) -> Settle:
    return Settle(hold.wallet_id, hold.hold_id, Usage(INPUT_TOKENS, 0, USED_TOKENS), "bench", "stop", 5)


@asynccontextmanager
async def writer(url: str, in_flight_max: int) -> AsyncIterator[Pair]:
    """The writer in this process, which collects garbage as the service does."""
    collect_seldom()
    shards = ShardLimits()
    limits = WriterLimits(
        operation_timeout_s=PATIENCE_S,
        operations_in_flight_max=in_flight_max,
        wallets_in_memory_max=WALLETS_IN_MEMORY // shards.shards + 1,
    )
    peers = GrpcPeers(identity_ring(), timeout_s=PATIENCE_S)
    async with Database(url, DatabaseLimits(acquire_timeout_s=PATIENCE_S)) as database:
        ledger = Shards(
            database,
            url,
            peers,
            address="bench",
            signup_credits=0,
            metrics=BillingMetrics(CollectorRegistry()),
            limits=shards,
            writer_limits=limits,
        )
        leading = asyncio.create_task(ledger.run())
        user = uuid7()

        async def pair(wallet_id: UUID) -> None:
            hold = place(wallet_id, user)
            await ledger.submit(hold)
            await ledger.submit(settlement(hold))

        try:
            yield pair
        finally:
            leading.cancel()
            await asyncio.wait([leading])


@asynccontextmanager
async def end_to_end(target: str) -> AsyncIterator[Pair]:
    """A service that meters requests: shared/metering.py over gRPC to billing."""
    caller = Caller(target, identity_ring(), service="chat")
    client = Metering(caller, limits=MeteringLimits(call_timeout_s=PATIENCE_S, hold_timeout_s=PATIENCE_S))
    user, key = str(uuid7()), str(uuid7())

    async def pair(wallet_id: UUID) -> None:
        identity = Identity(kind="key", org_id=str(wallet_id), user_id=user, key_id=key)
        async with client.hold(identity, model=MODEL, input_tokens=INPUT_TOKENS, max_output_tokens=MAX_TOKENS) as hold:
            used = metering.Usage(input_tokens=INPUT_TOKENS, output_tokens=USED_TOKENS)
            receipt = await hold.settle(build="bench", finish_reason="stop", usage=used)
            assert receipt is not None, "the ledger was away"

    try:
        yield pair
    finally:
        await client.close()
        await caller.close()
