"""The kernel against the naive model of the rules, for long."""

from __future__ import annotations

import random
from datetime import timedelta
from uuid import UUID

import pytest

from tests.billing.test_kernel import pair, random_operation

OPERATIONS = 1_000_000
OPERATIONS_A_WALLET = 200
RECENT_HOLDS = 25


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_a_million_operations_do_what_a_naive_model_does() -> None:
    rng, applied = random.Random(1_000_003), 0
    while applied < OPERATIONS:
        state = pair()
        holds: list[UUID] = []
        for _ in range(OPERATIONS_A_WALLET):
            state.now += timedelta(milliseconds=rng.choice((0, 5, 500, 9_000)))
            operation = random_operation(rng, state, holds)
            del holds[:-RECENT_HOLDS]
            if not any(key in state.ledger.memory for key in operation.keys):
                state.both(operation)
                applied += 1
