"""Operations at random against billing processes that die, and a PostgreSQL that dies, at every point of a transaction.

What must come of it does not depend on where anything died: each operation that was answered happened once, and each
that is sent again until it is answered happens once. So the sums of every wallet are known from the answers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from services.billing.ledger import wire
from services.billing.ledger.operations import Charge, Freeze, Operation, Refund
from services.billing.ledger.results import Charged, Refunded, Result
from shared.errors import TollgateError
from shared.grpc import Caller
from shared.ids import uuid7
from shared.metering import REFUSAL_STATUSES
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from tests.billing.harness import MODEL, caller, grant, ledger_on
from tests.billing.victims import PATIENCE_S, Victims, eventually

WORKERS = 16
RICH, POOR = 10**12, 400
CALL_TIMEOUT_S = 3.0
REFUSALS = ("insufficient_quota", "credits_reserved", "wallet_frozen")


@dataclass(slots=True)
class Expected:
    """What a wallet must have been charged: between these, which differ only where an answer never came."""

    low: int = 0
    high: int = 0


@dataclass(slots=True)
class Customers:
    """Workers that hold, report, settle, void, abandon, charge and refund; and what must have come of it."""

    stubs: Sequence[LedgerStub]
    callers: Sequence[Caller]
    wallets: Sequence[UUID]
    expected: dict[UUID, Expected] = field(default_factory=dict)
    done: int = 0
    held: int = 0
    refused: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def worker(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopping.is_set():
            org_id = rng.choice(self.wallets)
            act = self._charge if rng.random() < 0.2 else self._request
            try:
                low, high = await act(rng, org_id)
            except TollgateError as e:
                if e.code not in REFUSALS:
                    raise
                self.refused += 1
                continue
            expected = self.expected.setdefault(org_id, Expected())
            expected.low += low
            expected.high += high
            self.done += 1

    async def _request(self, rng: random.Random, org_id: UUID) -> tuple[int, int]:
        hold_id, tokens = str(uuid7()), rng.randint(1, 50)
        request = pb.HoldRequest(
            hold_id=hold_id,
            org_id=str(org_id),
            user_id=str(uuid4()),
            plan="default",
            model=MODEL,
            worst_case=pb.Usage(output_tokens=tokens),
            ttl_ms=rng.choice((1_000, 3_000, 8_000)),
            request_id="req_torture",
        )
        await self.until_answered(rng, "Hold", request)
        self.held += 1
        if rng.random() < 0.2:
            await self._extend(rng, hold_id, str(org_id), tokens)
        return await self._finish(rng, hold_id, str(org_id), tokens)

    async def _charge(self, rng: random.Random, org_id: UUID) -> tuple[int, int]:
        """What people do: a charge, its refund, new credits, a freeze for a moment. What it cost in the end."""

        def authored() -> tuple[UUID, UUID, str, str]:
            return org_id, org_id, f"key:{uuid4()}", "user:torture"

        amount = rng.randint(1, 50)
        charged = await self.decided(rng, Charge(*authored(), uuid7(), amount, "test"))
        assert isinstance(charged, Charged)
        if rng.random() < 0.5:
            part = rng.choice((None, rng.randint(1, amount)))
            refunded = await self.decided(rng, Refund(*authored(), charged.charge_id, uuid7(), part, "test"))
            assert isinstance(refunded, Refunded)
            assert refunded.amount == (part or amount)
            amount -= refunded.amount
        if rng.random() < 0.2:
            soon = rng.choice((None, datetime.now(UTC) + timedelta(seconds=20)))
            try:
                await self.decided(rng, grant(org_id, rng.randint(1, 50), expires_at=soon))
            except TollgateError as e:
                if e.code != "expiry_in_past":
                    raise
        if rng.random() < 0.1:
            for frozen in (True, False):
                await self.decided(rng, Freeze(*authored(), frozen, "test"))
        return amount, amount

    async def decided(self, rng: random.Random, operation: Operation) -> Result:
        """As one process sends it to another, and now and then twice at once."""
        request = pb.ForwardRequest(operation=wire.operation_to_bytes(operation))
        copies = rng.choice((1, 1, 2))
        replies = await asyncio.gather(*(self.until_answered(rng, "Forward", request) for _ in range(copies)))
        assert all(reply == replies[0] for reply in replies)
        return wire.result_from_bytes(operation, replies[0].result)

    async def _extend(self, rng: random.Random, hold_id: str, org_id: str, tokens: int) -> None:
        more = pb.ExtendRequest(hold_id=hold_id, org_id=org_id, number=1, output_tokens=tokens + rng.randint(0, 50))
        try:
            covered = (await self.until_answered(rng, "Extend", more)).output_tokens
            assert tokens <= covered <= more.output_tokens
        except TollgateError as e:
            if e.code not in (*REFUSALS, "hold_resolved"):
                raise

    async def _finish(self, rng: random.Random, hold_id: str, org_id: str, tokens: int) -> tuple[int, int]:
        """End a hold in one of the ways there are: the least and the most that it must have cost."""
        way = rng.random()
        if way < 0.15:
            with contextlib.suppress(TollgateError):  # its time was over first: nothing was produced
                await self.until_answered(rng, "Void", pb.VoidRequest(hold_id=hold_id, org_id=org_id, reason="test"))
            return 0, 0
        if way < 0.3:
            return await self._abandon(rng, hold_id, org_id, rng.randint(1, tokens))
        used = rng.randint(0, tokens + 5)
        request = pb.SettleRequest(
            hold_id=hold_id, org_id=org_id, usage=pb.Usage(output_tokens=used), build="b", finish_reason="stop"
        )
        copies = 1 + (way > 0.85)
        replies = await asyncio.gather(*(self.until_answered(rng, "Settle", request) for _ in range(copies)))
        assert all(reply == replies[0] for reply in replies)
        assert replies[0].cost_nano == used
        return used, used

    async def _abandon(self, rng: random.Random, hold_id: str, org_id: str, used: int) -> tuple[int, int]:
        """One report, and never again a word: the sweeper settles it."""
        usage = pb.Usage(output_tokens=used)
        request = pb.HeartbeatRequest(hold_id=hold_id, org_id=org_id, usage=usage, ttl_ms=1_000)
        try:
            await self.until_answered(rng, "Heartbeat", request)
        except TollgateError as e:
            if e.code != "hold_resolved":
                raise
            return 0, used  # an earlier attempt may have arrived before the hold's time was over
        return used, used

    async def until_answered(self, rng: random.Random, method: str, request: Any) -> Any:
        """The same message to any process until one decides. Raises the ledger's refusal."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                number = rng.randrange(len(self.stubs))
                try:
                    stub = getattr(self.stubs[number], method)
                    return await self.callers[number].call(stub, request, timeout_s=CALL_TIMEOUT_S)
                except TollgateError as e:
                    if e.status in REFUSAL_STATUSES:
                        raise
                    await asyncio.sleep(rng.uniform(0.02, 0.1))

    async def progress(self, requests: int) -> None:
        goal = self.done + requests

        async def reached() -> bool:
            return self.done >= goal

        await eventually(reached, f"{requests} requests")


@asynccontextmanager
async def customers_of(victims: Victims, wallets: Sequence[UUID]) -> AsyncIterator[Customers]:
    """Wallets with credits, rich ones and poor ones, and workers on them."""
    async with ledger_on(victims.owner_url) as ledger:
        for number, org_id in enumerate(wallets):
            await ledger.writer.submit(grant(org_id, POOR if number % 4 == 3 else RICH))
    await victims.start_billing()
    callers = [caller(address) for address in victims.addresses]
    customers = Customers([LedgerStub(c.channel) for c in callers], callers, wallets)
    try:
        yield customers
    finally:
        for each in callers:
            await each.close()


async def check(victims: Victims, customers: Customers) -> None:
    """All holds ended, all books add up, nobody was frozen, and every wallet paid what the answers say."""
    async with ledger_on(victims.owner_url) as ledger:

        async def ended() -> bool:
            return int(await ledger.pool.fetchval("SELECT count(*) FROM billing.open_hold")) == 0

        await eventually(ended, "the end of what was abandoned")
        report = await ledger.verified()
        assert report.holds >= customers.held > 0
        for org_id, expected in customers.expected.items():
            spent = (await ledger.wallet(org_id)).spent
            assert expected.low <= spent <= expected.high, (org_id, spent, expected)
        assert await ledger.pool.fetchval("SELECT count(*) FROM billing.discrepancy") == 0
        assert await ledger.pool.fetchval("SELECT count(*) FROM billing.wallet WHERE frozen_at IS NOT NULL") == 0
