"""Any split of operations into batches, and any shuffle of those of different wallets, gives what one by one gives."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from services.billing.ledger.book import Account
from services.billing.ledger.operations import Operation
from services.billing.ledger.spending import Period, Subject
from shared.errors import TollgateError
from tests.billing.memory import MemoryLedger
from tests.billing.side_by_side import KEYS, MEMBERS, PERIODS, START, TERMS, figures, pair, random_operation

WALLETS = tuple(UUID(int=100 + n) for n in range(4))
MOMENTS = 12
OPERATIONS_A_MOMENT = 10


@dataclass(frozen=True, slots=True)
class Moment:
    """What happens at one time: somebody sets a budget in every wallet, then operations in the order of each."""

    now: datetime
    budget: tuple[Subject, UUID, dict[Period, int]]
    operations: dict[UUID, list[Operation]]


class Wallets:
    """Books of several wallets, which batches have in common."""

    def __init__(self) -> None:
        self.ledgers = {wallet_id: MemoryLedger(wallet_id, TERMS, START) for wallet_id in WALLETS}
        self.outcomes: dict[UUID, list[tuple[int, ...] | str]] = defaultdict(list)

    def set_budget(self, moment: Moment) -> None:
        subject, who, limits = moment.budget
        for ledger in self.ledgers.values():
            ledger.set_budget(subject, who, dict(limits), moment.now)

    def batch(self, operations: Sequence[Operation], now: datetime) -> None:
        """As the writer does it: what refunds need is read first, and all is written at the end."""
        journal = self.ledgers[WALLETS[0]].journal(now)
        for operation in operations:
            self.ledgers[operation.wallet_id].look_up(operation)
        for operation in operations:
            outcome: tuple[int, ...] | str
            try:
                outcome = figures(self.ledgers[operation.wallet_id].apply(operation, now, journal))
            except TollgateError as e:
                outcome = e.code
            self.outcomes[operation.wallet_id].append(outcome)
        for ledger in self.ledgers.values():
            ledger.book.draws.clear()
            ledger.wrote(journal.rows)
            ledger.check()

    def state(self) -> dict[UUID, object]:
        """What each wallet came to, without the ids that are made anew every time."""
        return {wallet_id: (self.outcomes[wallet_id], _state(ledger)) for wallet_id, ledger in self.ledgers.items()}


def _state(ledger: MemoryLedger) -> object:
    names = {account.id: _name(account) for account in ledger.accounts}
    counters = {_name(account): account.counters()[1:] for account in ledger.accounts}
    transfers = [
        (t.code, t.amount, names[t.debit_account], names[t.credit_account], t.hold_id, t.balance_after)
        for t in ledger.transfers
    ]
    return counters, transfers, ledger.fingerprint()[-1], ledger.moved


def _name(account: Account) -> object:
    """Grants' ids are their operations'."""
    return account.id if account.kind == "grant" else account.kind


def story(rng: random.Random) -> list[Moment]:
    """Operations at random of each wallet, such as make sense one after the other."""
    states = {wallet_id: pair() for wallet_id in WALLETS}
    moments, now = [], START
    for _ in range(MOMENTS):
        now += timedelta(seconds=rng.choice((0, 1, 30, 80_000)))
        subject: Subject = rng.choice(("key", "member"))
        who = rng.choice(KEYS if subject == "key" else MEMBERS)
        limits = {period: rng.choice((rng.randint(0, 2_000), 10**9)) for period in PERIODS}
        operations: dict[UUID, list[Operation]] = {wallet_id: [] for wallet_id in WALLETS}
        for wallet_id, state in states.items():
            state.now = now
            for _ in range(OPERATIONS_A_MOMENT):
                operation = random_operation(rng, state)
                if not any(key in state.ledger.memory for key in operation.keys):
                    state.both(operation)
                    operations[wallet_id].append(replace(operation, wallet_id=wallet_id))
        moments.append(Moment(now, (subject, who, limits), operations))
    return moments


def in_order(moment: Moment) -> list[Operation]:
    return [operation for operations in moment.operations.values() for operation in operations]


def shuffled(rng: random.Random, moment: Moment) -> list[Operation]:
    """Wallets mixed at random; each keeps the order of its own."""
    left = {wallet_id: list(operations) for wallet_id, operations in moment.operations.items()}
    turns = [wallet_id for wallet_id, operations in left.items() for _ in operations]
    rng.shuffle(turns)
    return [left[wallet_id].pop(0) for wallet_id in turns]


def split(rng: random.Random, operations: Sequence[Operation]) -> Iterator[Sequence[Operation]]:
    while operations:
        size = rng.choice((1, 2, 5, len(operations)))
        yield operations[:size]
        operations = operations[size:]


@pytest.mark.parametrize("seed", range(5))
def test_any_split_and_shuffle_of_a_batch_gives_what_one_by_one_gives(seed: int) -> None:
    rng = random.Random(seed)
    moments = story(rng)
    one_by_one = Wallets()
    for moment in moments:
        one_by_one.set_budget(moment)
        for operation in in_order(moment):
            one_by_one.batch([operation], moment.now)
    for _ in range(3):
        wallets = Wallets()
        for moment in moments:
            wallets.set_budget(moment)
            for operations in split(rng, shuffled(rng, moment)):
                wallets.batch(operations, moment.now)
        assert wallets.state() == one_by_one.state()
    refusals = {o for outcomes in one_by_one.outcomes.values() for o in outcomes if isinstance(o, str)}
    assert len(refusals) > 2, "operations that depend on those before them"
