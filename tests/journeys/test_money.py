"""Prepaid means prepaid: nothing is served that the wallet does not cover, however many ask at once."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import httpx
import openai
import pytest

from tests.journeys.conftest import unlimit
from tests.journeys.people import QUESTION, TIMEOUT_S, User, asking, client
from tests.running_stack import RunningStack

TOKEN_CREDITS = 10  # so that the sign-up credits are worth ten tokens
SIGNUP_TOKENS = 10


@pytest.fixture
def poor_user(stack: RunningStack, user: User) -> User:
    """Somebody with a price of their own, for whom every output token costs TOKEN_CREDITS."""
    unlimit(stack, user)
    price = {
        "model": "chat-mini",
        "customer_class": f"org:{user.org_id}",
        "input": "0",
        "cached_input": "0",
        "output": str(TOKEN_CREDITS * 10**6),
    }
    with client(stack.url, stack.admin_token) as admin:
        answer = admin.post(
            "/api/v1/admin/billing/prices", json=price, headers={"Idempotency-Key": secrets.token_hex(8)}
        )
    assert answer.status_code == 201, answer.text
    return user


def test_a_customers_own_price_is_in_the_model_list(poor_user: User) -> None:
    model = poor_user.api.get("/v1/models/chat-mini").json()
    assert Decimal(model["prices"]["output"]) == TOKEN_CREDITS * 10**6


def test_a_limit_that_the_wallet_does_not_cover_is_refused_with_402(poor_user: User) -> None:
    with pytest.raises(openai.APIStatusError) as e:
        poor_user.openai().chat.completions.create(
            model="chat-mini",
            messages=list(QUESTION),  # type: ignore[arg-type]
            max_tokens=SIGNUP_TOKENS + 1,
        )
    assert (e.value.status_code, e.value.code, e.value.type) == (402, "insufficient_quota", "insufficient_quota")
    assert poor_user.wallet().available == SIGNUP_TOKENS * TOKEN_CREDITS


def test_without_a_limit_the_wallet_bounds_the_answer_until_nothing_is_left(poor_user: User) -> None:
    spent = 0
    while (answer := poor_user.ask()).status_code == 200:
        tokens = answer.json()["usage"]["completion_tokens"]
        assert 1 <= tokens <= SIGNUP_TOKENS - spent
        spent += tokens
        assert poor_user.wallet().balance == (SIGNUP_TOKENS - spent) * TOKEN_CREDITS
    assert answer.status_code == 402
    assert spent == SIGNUP_TOKENS


def test_many_at_once_never_overdraw(poor_user: User) -> None:
    def ask(_: int) -> int:
        return httpx.post(
            f"{poor_user.url}/v1/chat/completions",
            json=asking(max_tokens=1),
            headers={"Authorization": f"Bearer {poor_user.key}"},
            timeout=TIMEOUT_S,
        ).status_code

    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(ask, range(40)))
    assert statuses.count(200) == SIGNUP_TOKENS
    assert statuses.count(402) == len(statuses) - SIGNUP_TOKENS
    assert poor_user.wallet().balance == poor_user.wallet().held == 0
