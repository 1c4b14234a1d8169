"""A Hypothesis state machine: the ledger on real PostgreSQL beside the naive model of its rules, step by step.

Time stands still but for what a rule moves: holds live for a quarter of an hour, and one expires when a rule says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from services.billing.domain import Usage
from services.billing.errors import IdempotencyMismatch
from services.billing.ledger.operations import (
    Charge,
    ExpireHold,
    ExtendHold,
    Freeze,
    Heartbeat,
    Operation,
    PlaceHold,
    Refund,
    Settle,
    TakeBack,
    Void,
)
from services.billing.ledger.results import Extended, Result
from services.billing.repository.verification import wallets_step
from shared.errors import TollgateError
from shared.ids import uuid7
from tests.billing.harness import TERMS, Ledger, grant, ledger_on, place
from tests.billing.oracle import Oracle, Refused

T = TypeVar("T")
LIFE_MS = 15 * 60 * 1000
TOKENS = st.integers(0, 60)
KEY, MEMBERS = UUID(int=11), (UUID(int=21), UUID(int=22))
BUDGET = """INSERT INTO billing.budget (wallet_id, subject, subject_id, period, amount, updated_at)
    VALUES ($1, $2, $3, $4, $5, now())
    ON CONFLICT (wallet_id, subject, subject_id, period) DO UPDATE SET amount = excluded.amount"""


class Bridge:
    """A ledger in an event loop of its own, driven from outside it."""

    def __init__(self, owner_url: str) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.ledger: Ledger = self.run(self._stack.enter_async_context(ledger_on(owner_url, signup_nano=0)))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._runner.close()


class LedgerMachine(RuleBasedStateMachine):
    """One wallet. `bridge` is set by the test."""

    bridge: Bridge
    holds: Bundle[PlaceHold] = Bundle("holds")
    done: Bundle[Operation] = Bundle("done")

    def __init__(self) -> None:
        super().__init__()
        self.org_id = uuid4()
        self.oracle = Oracle(TERMS)
        self.remembered: dict[str, tuple[bytes, Result | str]] = {}
        self.charged: list[UUID] = []
        self.granted: list[UUID] = []

    @initialize()
    def opened(self) -> None:
        self.both(grant(self.org_id, 100))

    @rule(target=done, amount=st.integers(1, 80), priority=st.sampled_from((10, 100)), days=st.sampled_from((0, 5, 9)))
    def grants(self, amount: int, priority: int, days: int) -> Operation:
        expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
        operation = grant(self.org_id, amount, priority=priority, expires_at=expires_at)
        self.granted.append(operation.account_id)
        return self.both(operation)

    @rule(target=done, which=st.integers(1, 5), total=st.integers(1, 80))
    def takes_back(self, which: int, total: int) -> Operation:
        granted = self.granted[-which] if which <= len(self.granted) else uuid7()
        return self.both(TakeBack(*self.authored(), granted, total, "test"))

    @rule(
        target=holds,
        tokens=st.integers(1, 60),
        clamp=st.booleans(),
        key_id=st.sampled_from((None, KEY)),
        user_id=st.sampled_from(MEMBERS),
    )
    def places(self, tokens: int, clamp: bool, key_id: UUID | None, user_id: UUID) -> PlaceHold:
        operation = place(self.org_id, tokens, clamp=clamp, ttl_ms=LIFE_MS, key_id=key_id, user_id=user_id)
        self.both(operation)
        return operation

    @rule(target=done, amount=st.integers(1, 60))
    def charges(self, amount: int) -> Operation:
        charge = Charge(*self.authored(), uuid7(), amount, "test")
        self.charged.append(charge.charge_id)
        return self.both(charge)

    @rule(target=done, hold=holds, amount=st.one_of(st.none(), st.integers(1, 60)), which=st.integers(0, 5))
    def refunds(self, hold: PlaceHold, amount: int | None, which: int) -> Operation:
        source = self.charged[-which] if 0 < which <= len(self.charged) else hold.hold_id
        return self.both(Refund(*self.authored(), source, uuid7(), amount, "test"))

    @rule(target=done, frozen=st.sampled_from((True, False, False, False)))
    def freezes(self, frozen: bool) -> Operation:
        return self.both(Freeze(*self.authored(), frozen, "test"))

    @rule(who=st.sampled_from((KEY, *MEMBERS)), day=st.integers(0, 200), month=st.integers(0, 400))
    def sets_budgets(self, who: UUID, day: int, month: int) -> None:
        subject = "key" if who == KEY else "member"
        for period, amount in (("day", day), ("month", month)):
            arguments = (BUDGET, self.org_id, subject, who, period, amount)
            self.bridge.run(self.bridge.ledger.pool.execute(*arguments))
        self.oracle.set_budget(who, day, month, datetime.now(UTC))

    def authored(self) -> tuple[UUID, UUID, str, str]:
        return self.org_id, self.org_id, f"key:{uuid4()}", "user:test"

    @rule(target=done, hold=holds, number=st.integers(1, 4), tokens=st.integers(1, 120))
    def extends(self, hold: PlaceHold, number: int, tokens: int) -> Operation:
        return self.both(ExtendHold(self.org_id, hold.hold_id, number, tokens))

    @rule(hold=holds, tokens=TOKENS)
    def reports(self, hold: PlaceHold, tokens: int) -> None:
        self.both(Heartbeat(self.org_id, hold.hold_id, Usage(0, 0, tokens), LIFE_MS))

    @rule(target=done, hold=holds, tokens=TOKENS)
    def settles(self, hold: PlaceHold, tokens: int) -> Operation:
        return self.both(Settle(self.org_id, hold.hold_id, Usage(0, 0, tokens), "build", "stop", 5))

    @rule(target=done, hold=holds)
    def voids(self, hold: PlaceHold) -> Operation:
        return self.both(Void(self.org_id, hold.hold_id, "test"))

    @rule(target=done, hold=holds)
    def expires(self, hold: PlaceHold) -> Operation:
        self.bridge.run(self.bridge.ledger.expire_now(hold.hold_id))
        if hold.hold_id in self.oracle.open:
            self.oracle.open[hold.hold_id].expires_at = datetime.now(UTC) - timedelta(seconds=1)
        return self.both(ExpireHold(self.org_id, hold.hold_id))

    @rule(operation=st.one_of(done, holds))
    def comes_again(self, operation: Operation) -> None:
        """What is remembered answers as before, whatever happened since; with another body it is refused."""
        if operation.key in self.remembered:
            digest, before = self.remembered[operation.key]
            expected = before if digest == operation.body_sha256() else IdempotencyMismatch.default_code
            assert self.outcome(operation) == expected

    @invariant()
    def sums_are_those_of_the_model(self) -> None:
        now, run = datetime.now(UTC), self.bridge.run
        wallet = run(self.bridge.ledger.wallet(self.org_id)) if self.remembered else None
        if wallet is not None:
            assert wallet.available == self.oracle.available(now)
            assert wallet.receivable == self.oracle.owed
            assert wallet.spent == self.oracle.spent
            assert wallet.held == sum(request.amount for request in self.oracle.open.values())

    @invariant()
    def books_add_up(self) -> None:
        async def differences() -> list[Any]:
            before = UUID(int=self.org_id.int - 1)
            async with self.bridge.ledger.pool.acquire() as connection:
                return (await wallets_step(connection, before, None, wallets_max=1)).differences

        assert self.bridge.run(differences()) == []

    def both(self, operation: Operation) -> Operation:
        """Apply it to both, unless it was before, and compare the figures of their answers."""
        expected: tuple[int, ...] | str
        if any(key in self.remembered for key in operation.keys):
            return operation
        try:
            expected = self.oracle.apply(operation, datetime.now(UTC))
        except Refused as e:
            expected = str(e)
        actual = self.outcome(operation)
        assert figures(actual) == expected, (operation, actual, expected)
        if operation.remembered and actual not in ("hold_not_found", "hold_not_expired", "nothing_to_refund"):
            self.remembered[operation.key] = operation.body_sha256(), actual
        return operation

    def outcome(self, operation: Operation) -> Result | str:
        try:
            return self.bridge.run(self.bridge.ledger.writer.submit(operation))
        except TollgateError as e:
            return e.code


def figures(outcome: Result | str) -> tuple[int, ...] | str:
    """The numbers of a result, without ids and times."""
    if isinstance(outcome, str):
        return outcome
    if outcome is None or isinstance(outcome, Extended):
        return ()
    return tuple(v for v in astuple(outcome) if isinstance(v, int))


@contextmanager
def machine(fresh_url: str) -> Iterator[type[LedgerMachine]]:
    LedgerMachine.bridge = Bridge(fresh_url)
    try:
        yield LedgerMachine
    finally:
        LedgerMachine.bridge.close()


def run(url: str, examples: int, steps: int) -> None:
    with machine(url) as ledger_machine:
        run_state_machine_as_test(
            ledger_machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
        ledger_machine.bridge.run(ledger_machine.bridge.ledger.verified())


def test_the_ledger_does_what_the_model_does_whatever_comes_in_whatever_order(owner_url: str) -> None:
    run(owner_url, examples=6, steps=20)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_the_ledger_does_so_for_long(owner_url: str) -> None:
    run(owner_url, examples=400, steps=50)
