"""The ledger on PostgreSQL: a wallet opened once, idempotency, races, expiry; the books are right after every step."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.billing.domain import Usage
from services.billing.errors import (
    CreditsReserved,
    HoldNotFound,
    HoldResolved,
    IdempotencyMismatch,
    InsufficientCredits,
    WalletFrozen,
)
from services.billing.ledger.operations import ExpireGrant, ExpireHold, OpenWallet, Operation, Void
from services.billing.ledger.results import Extended, Granted, Held, Settled, Voided
from shared.errors import TollgateError
from shared.ids import service_account_id, uuid7
from tests.billing.harness import SIGNUP_NANO, Ledger, grant, heartbeat, ledger_on, place, settle, wait_until

STEPS = 150
SEED = 11


async def outcomes(ledger: Ledger, *operations: Operation) -> list[Any]:
    """All at once; results and refusals in order."""
    answers = await asyncio.gather(*(ledger.writer.submit(op) for op in operations), return_exceptions=True)
    assert all(isinstance(a, TollgateError) for a in answers if isinstance(a, BaseException)), answers
    return answers


async def count(ledger: Ledger, query: str, *arguments: object) -> int:
    found: int = await ledger.pool.fetchval(query, *arguments)
    return found


async def test_a_wallet_is_opened_once_with_its_signup_grant_however_many_come_first(
    ledger: Ledger, org_id: UUID
) -> None:
    person = uuid4()
    operations: list[Operation] = [OpenWallet(org_id, person) for _ in range(5)]
    operations += [place(org_id, 10, user_id=person) for _ in range(10)]
    answers = await outcomes(ledger, *operations)
    assert sum(isinstance(a, Held) for a in answers) == 10
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.held, wallet.available) == (SIGNUP_NANO, 100, SIGNUP_NANO - 100)
    assert await count(ledger, "SELECT count(*) FROM billing.op WHERE idem_key = $1", f"signup:{person}") == 1
    await ledger.verified()


async def test_a_person_gets_signup_credits_once_whatever_wallets_they_open(ledger: Ledger) -> None:
    person, wallets = uuid4(), [uuid4() for _ in range(6)]
    await outcomes(ledger, *(OpenWallet(wallet, person) for wallet in wallets))
    assert sum([(await ledger.wallet(wallet)).granted for wallet in wallets]) == SIGNUP_NANO
    with pytest.raises(InsufficientCredits):
        await ledger.held(uuid4(), 1, user_id=person)
    await ledger.verified()


async def test_a_service_account_is_no_person_who_gets_signup_credits(ledger: Ledger) -> None:
    """Whoever makes organisations and service accounts by the dozen makes no credits."""
    opened, held = uuid4(), uuid4()
    await ledger.writer.submit(OpenWallet(opened, service_account_id()))
    assert (await ledger.wallet(opened)).granted == 0
    with pytest.raises(InsufficientCredits):
        await ledger.held(held, 1, user_id=service_account_id())
    await ledger.writer.submit(OpenWallet(opened, uuid4()))  # the first person does
    assert (await ledger.wallet(opened)).granted == SIGNUP_NANO
    await ledger.verified()


async def test_a_wallet_that_nobody_has_opened_in_person_has_no_signup_credits(ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(grant(org_id, 7))
    await ledger.writer.submit(OpenWallet(org_id))
    assert (await ledger.wallet(org_id)).granted == 7


async def test_a_request_is_charged_exactly_what_it_used(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 400)
    assert (held.amount, held.available) == (400, SIGNUP_NANO - 400)
    settled = await ledger.writer.submit(settle(org_id, held.hold_id, 123))
    assert settled == Settled(cost=123, settled=123, receivable=0, available=SIGNUP_NANO - 123)
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.held, wallet.spent) == (SIGNUP_NANO - 123, 0, 123)
    row = await ledger.pool.fetchrow("SELECT * FROM billing.usage WHERE hold_id = $1", held.hold_id)
    assert (row["output_tokens"], row["cost"], row["build"], row["finish_reason"]) == (
        123,
        123,
        "chat-mini-q8_0",
        "stop",
    )
    await ledger.verified()


async def test_the_same_operation_again_gets_the_stored_answer(ledger: Ledger, org_id: UUID) -> None:
    placed = place(org_id, 100)
    first = await ledger.writer.submit(placed)
    assert isinstance(first, Held)
    assert await ledger.writer.submit(placed) == first
    posted = settle(org_id, first.hold_id, 40)
    receipt = await ledger.writer.submit(posted)
    assert await ledger.writer.submit(posted) == receipt
    assert await ledger.writer.submit(placed) == first
    assert (await ledger.wallet(org_id)).spent == 40


async def test_a_refusal_is_remembered_even_when_credits_have_come_since(ledger: Ledger, org_id: UUID) -> None:
    too_much = place(org_id, SIGNUP_NANO + 1)
    for _ in range(2):
        with pytest.raises(TollgateError) as refused:
            await ledger.writer.submit(too_much)
        assert (refused.value.status, refused.value.code) == (402, "insufficient_quota")
        await ledger.writer.submit(grant(org_id, 500))
    assert await ledger.held(org_id, SIGNUP_NANO + 1)


async def test_concurrent_duplicates_are_applied_once_and_all_get_the_answer(ledger: Ledger, org_id: UUID) -> None:
    credit = grant(org_id, 50)
    async with ledger_on(ledger.owner_url) as other:
        answers = await asyncio.gather(*(each.writer.submit(credit) for each in (ledger, other) for _ in range(10)))
    assert {type(a) for a in answers} == {Granted}
    assert len(set(answers)) == 1
    assert (await ledger.wallet(org_id)).granted == 50


async def test_of_concurrent_operations_with_one_key_and_different_bodies_one_is_applied(
    ledger: Ledger, org_id: UUID
) -> None:
    tenant = uuid4()
    rivals: list[Operation] = [
        grant(wallet, 10 + n, idempotency_tenant=tenant, idempotency_key="key:same")
        for n in range(5)
        for wallet in (org_id, uuid4())
    ]
    answers = await outcomes(ledger, *rivals)
    assert sum(isinstance(a, Granted) for a in answers) == 1
    assert sum(isinstance(a, IdempotencyMismatch) for a in answers) == len(rivals) - 1
    assert await count(ledger, "SELECT count(*) FROM billing.op WHERE tenant = $1", tenant) == 1
    await ledger.verified()


async def test_retries_wait_for_the_operation_that_is_under_way(ledger: Ledger, org_id: UUID) -> None:
    """Callers give up and come again: they take no place in the queue, and other shards do not wait."""
    held = await ledger.held(org_id, 100)
    elsewhere = UUID(int=uuid4().int & ~0xFF | (org_id.int + 1) % 256)
    posted = settle(org_id, held.hold_id, 40)
    async with ledger.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM billing.wallet WHERE id = $1 FOR UPDATE", org_id)
        impatient = [asyncio.create_task(ledger.writer.submit(posted)) for _ in range(10)]
        await asyncio.wait(impatient, timeout=0.1)
        for caller in impatient:
            caller.cancel()
        await asyncio.wait(impatient)
        retries = [asyncio.create_task(ledger.writer.submit(posted)) for _ in range(10)]
        assert isinstance(await ledger.writer.submit(place(elsewhere, 10)), Held)
        with pytest.raises(IdempotencyMismatch):
            await ledger.writer.submit(settle(org_id, held.hold_id, 41))
        assert not any(retry.done() for retry in retries)
        assert ledger.writer.writer_of(org_id).waiting == 1
    assert set(await asyncio.gather(*retries)) == {Settled(40, 40, 0, SIGNUP_NANO - 40)}
    assert (await ledger.wallet(org_id)).spent == 40
    with pytest.raises(IdempotencyMismatch):
        await ledger.writer.submit(settle(org_id, held.hold_id, 41))


async def test_heartbeats_with_different_usage_do_not_clash(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 100)
    answers = await outcomes(ledger, *[heartbeat(org_id, held.hold_id, n) for n in range(5)])
    assert {type(a) for a in answers} == {Extended}


async def test_a_hold_belongs_to_one_wallet(ledger: Ledger, org_id: UUID) -> None:
    held, stranger = await ledger.held(org_id, 100), uuid4()
    await ledger.writer.submit(OpenWallet(stranger, uuid4()))
    with pytest.raises(IdempotencyMismatch):
        await ledger.writer.submit(place(stranger, 100, hold_id=held.hold_id))
    for foreign in (
        settle(stranger, held.hold_id, 1),
        heartbeat(stranger, held.hold_id, 1),
        Void(stranger, held.hold_id, "mine"),
    ):
        with pytest.raises(HoldNotFound):
            await ledger.writer.submit(foreign)
    assert (await ledger.wallet(org_id)).held == 100


async def test_a_hold_that_is_not_there_yet_is_not_remembered_as_missing(ledger: Ledger, org_id: UUID) -> None:
    placed = place(org_id, 10)
    for unknown in (org_id, uuid4()):
        with pytest.raises(HoldNotFound):
            await ledger.writer.submit(Void(unknown, placed.hold_id, "early"))
    await ledger.writer.submit(placed)
    assert await ledger.writer.submit(Void(org_id, placed.hold_id, "early")) == Voided(10)


async def test_settlement_expiry_and_void_race_to_one_resolution(ledger: Ledger) -> None:
    kinds: set[str] = set()
    for round_number in range(25):
        org_id = uuid4()
        held = await ledger.held(org_id, 100)
        await ledger.writer.submit(heartbeat(org_id, held.hold_id, 30))
        await ledger.expire_now(held.hold_id)
        rivals: list[Operation] = [
            settle(org_id, held.hold_id, 70),
            ExpireHold(org_id, held.hold_id),
            Void(org_id, held.hold_id, "failed"),
        ]
        random.Random(round_number).shuffle(rivals)
        answers = dict(zip((op.kind for op in rivals), await outcomes(ledger, *rivals), strict=True))
        kind = await ledger.pool.fetchval("SELECT kind FROM billing.hold_resolution WHERE hold_id = $1", held.hold_id)
        kinds.add(kind)
        wallet = await ledger.wallet(org_id)
        # After an expiry a settlement adds its remainder; otherwise the first one alone counts.
        assert wallet.spent == (0 if kind == "void" else 70)
        assert (wallet.held, wallet.balance) == (0, SIGNUP_NANO - wallet.spent)
        won = {"post": "settle", "void": "void", "expire": "expire"}[kind]
        assert not isinstance(answers[won], TollgateError)
    assert len(kinds) > 1
    await ledger.verified()


async def test_two_processes_resolve_a_hold_once(ledger: Ledger) -> None:
    async with ledger_on(ledger.owner_url) as other:
        for _ in range(15):
            org_id = uuid4()
            held = await ledger.held(org_id, 100)
            await ledger.expire_now(held.hold_id)
            operations = (settle(org_id, held.hold_id, 50), ExpireHold(org_id, held.hold_id))
            rivals = [each.writer.submit(operation) for each in (ledger, other) for operation in operations]
            answers = await asyncio.gather(*rivals, return_exceptions=True)
            assert all(isinstance(a, Settled | HoldResolved) for a in answers), answers
            wallet = await ledger.wallet(org_id)
            assert (wallet.spent, wallet.held) == (50, 0)
    await ledger.verified()


async def test_the_sweeper_settles_what_the_last_heartbeat_reported(ledger: Ledger, org_id: UUID) -> None:
    reported, silent = await ledger.held(org_id, 100, ttl_ms=150), await ledger.held(org_id, 200, ttl_ms=150)
    await ledger.writer.submit(heartbeat(org_id, reported.hold_id, 33, ttl_ms=150))

    async def swept() -> bool:
        await ledger.sweeper.sweep()
        return (await ledger.wallet(org_id)).held == 0

    await wait_until(swept, "expiry")
    assert (await ledger.wallet(org_id)).spent == 33
    late = await ledger.writer.submit(settle(org_id, reported.hold_id, 45))
    assert late == Settled(cost=45, settled=12, receivable=0, available=SIGNUP_NANO - 45)
    assert await ledger.writer.submit(settle(org_id, reported.hold_id, 45)) == late
    after_silence = await ledger.writer.submit(settle(org_id, silent.hold_id, 5))
    assert after_silence == Settled(cost=5, settled=5, receivable=0, available=SIGNUP_NANO - 50)
    keys = await ledger.pool.fetch("SELECT idem_key FROM billing.op WHERE tenant = $1 AND kind = 'settle'", org_id)
    assert {k[0] for k in keys} == {f"late:{reported.hold_id}", f"late:{silent.hold_id}"}
    await ledger.verified()


async def test_a_heartbeat_keeps_a_hold_from_the_sweeper(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 100)
    await ledger.expire_now(held.hold_id)
    await ledger.writer.submit(heartbeat(org_id, held.hold_id, 10))
    await ledger.sweeper.sweep()
    assert (await ledger.wallet(org_id)).held == 100


async def test_the_sweeper_moves_expired_grants_to_breakage(ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(OpenWallet(org_id, uuid4()))
    credit = grant(org_id, 70, expires_at=datetime.now(UTC) + timedelta(hours=1), priority=1)
    await ledger.writer.submit(credit)
    held = await ledger.held(org_id, 30)  # drawn from the grant that expires
    await ledger.lapse_now(credit.account_id)

    async def swept() -> bool:
        await ledger.sweeper.sweep()
        left = "SELECT count(*) FROM billing.expiring_grant WHERE account_id = $1"
        return await count(ledger, left, credit.account_id) == 0

    await wait_until(swept, "expiry of the grant")
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.held, wallet.available) == (SIGNUP_NANO + 30, 30, SIGNUP_NANO)
    await ledger.writer.submit(settle(org_id, held.hold_id, 10))
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.available, wallet.spent) == (SIGNUP_NANO, SIGNUP_NANO, 10)
    await ledger.verified()


async def test_usage_beyond_the_credits_is_owed_and_blocks(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, SIGNUP_NANO)
    settled = await ledger.writer.submit(settle(org_id, held.hold_id, SIGNUP_NANO + 200))
    assert settled == Settled(SIGNUP_NANO + 200, SIGNUP_NANO, 200, 0)
    with pytest.raises(TollgateError) as refused:
        await ledger.held(org_id, 1, clamp=True)
    assert refused.value.code == "insufficient_quota"
    await ledger.writer.submit(grant(org_id, 250))
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.receivable, wallet.spent) == (50, 0, SIGNUP_NANO + 200)
    await ledger.verified()


async def test_reserved_credits_say_so_and_clamping_takes_what_is_left(ledger: Ledger, org_id: UUID) -> None:
    await ledger.held(org_id, SIGNUP_NANO - 10)
    with pytest.raises(CreditsReserved):
        await ledger.held(org_id, 11)
    clamped = await ledger.held(org_id, 500, clamp=True)
    assert (clamped.output_tokens, clamped.amount, clamped.available) == (10, 10, 0)


async def test_a_frozen_wallet_takes_no_new_holds_but_settles_old_ones(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 100)
    await ledger.pool.execute("UPDATE billing.wallet SET frozen_at = now() WHERE id = $1", org_id)
    with pytest.raises(WalletFrozen):
        await ledger.held(org_id, 1)
    assert isinstance(await ledger.writer.submit(settle(org_id, held.hold_id, 7)), Settled)


async def test_a_clock_that_was_set_back_does_not_reorder_history(ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(OpenWallet(org_id))
    await ledger.pool.execute("UPDATE billing.wallet SET updated_at = now() + interval '1 hour' WHERE id = $1", org_id)
    for amount in (1, 2, 3):
        await ledger.writer.submit(grant(org_id, amount))
    rows = await ledger.pool.fetch(
        "SELECT booked_at FROM billing.transfer WHERE wallet_id = $1 ORDER BY wallet_seq", org_id
    )
    times = [row[0] for row in rows]
    assert times == sorted(times)


async def test_a_clock_that_was_set_back_does_not_lengthen_lives(ledger: Ledger, org_id: UUID) -> None:
    """What was written while the clock was ahead says nothing about when a hold or a grant ends."""
    await ledger.writer.submit(OpenWallet(org_id, uuid4()))
    await ledger.pool.execute("UPDATE billing.wallet SET updated_at = now() + interval '1 hour' WHERE id = $1", org_id)
    soon = datetime.now(UTC) + timedelta(minutes=30)
    await ledger.writer.submit(grant(org_id, 70, expires_at=soon, priority=1))
    held = await ledger.held(org_id, 30, ttl_ms=60_000)
    assert held.available == SIGNUP_NANO + 40
    assert held.expires_at < soon
    extended = await ledger.writer.submit(heartbeat(org_id, held.hold_id, 10))
    assert isinstance(extended, Extended)
    assert extended.expires_at < soon
    await ledger.expire_now(held.hold_id)
    await ledger.sweeper.sweep()
    assert (await ledger.wallet(org_id)).spent == 10
    row = await ledger.pool.fetchrow("SELECT * FROM billing.usage WHERE hold_id = $1", held.hold_id)
    assert row["duration_ms"] >= 0
    await ledger.verified()


async def test_the_books_are_right_after_every_step_of_random_operations(ledger: Ledger) -> None:
    rng = random.Random(SEED)
    wallets = [uuid4() for _ in range(3)]
    holds: list[tuple[UUID, UUID]] = []
    grants: list[tuple[UUID, UUID]] = []
    for _ in range(STEPS):
        org_id = rng.choice(wallets)
        org, hold_id = rng.choice(holds) if holds else (org_id, uuid7())
        expiry = rng.choice((None, datetime.now(UTC) + timedelta(milliseconds=rng.randint(5, 400))))
        credit = grant(org_id, rng.randint(1, 400), expires_at=expiry, priority=rng.choice((1, 100)))
        placed = place(org_id, rng.randint(1, 500), clamp=rng.random() < 0.5, ttl_ms=rng.choice((100, 60_000)))
        operation: Operation = rng.choice(
            (
                credit,
                placed,
                placed,
                heartbeat(org, hold_id, rng.randint(0, 300)),
                settle(org, hold_id, rng.randint(0, 700)),
                Void(org, hold_id, "test"),
                ExpireHold(org, hold_id),
                ExpireGrant(*rng.choice(grants)) if grants else credit,
            )
        )
        [answer] = await outcomes(ledger, operation)
        if isinstance(answer, Held):
            holds.append((org_id, answer.hold_id))
        if isinstance(answer, Granted):
            grants.append((org_id, answer.grant_id))
        await ledger.verified()


async def test_usage_is_written_with_who_and_what(ledger: Ledger, org_id: UUID) -> None:
    placed = place(org_id, 100, key_id=uuid4(), worst_case=Usage(20, 0, 100))
    await ledger.writer.submit(placed)
    await ledger.writer.submit(settle(org_id, placed.hold_id, 9))
    row = await ledger.pool.fetchrow("SELECT * FROM billing.usage WHERE hold_id = $1", placed.hold_id)
    assert (row["wallet_id"], row["user_id"], row["key_id"]) == (org_id, placed.user_id, placed.key_id)
    assert (row["model"], row["request_id"], row["duration_ms"]) == ("chat-mini", "req_test", 5)
