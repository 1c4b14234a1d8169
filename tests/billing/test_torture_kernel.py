"""The kernel against the naive model of the rules, for long."""

from __future__ import annotations

import random

import pytest

from tests.billing.side_by_side import pair, random_step

OPERATIONS = 1_000_000
OPERATIONS_A_WALLET = 200


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_a_million_operations_do_what_a_naive_model_does() -> None:
    rng, applied = random.Random(1_000_003), 0
    while applied < OPERATIONS:
        state = pair()
        for _ in range(OPERATIONS_A_WALLET):
            operation = random_step(rng, state)
            if operation is not None:
                state.both(operation)
                applied += 1
