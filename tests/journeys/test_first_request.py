"""The first request: what a stranger does with the printed key and OpenAI's SDK."""

import re
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest

from tests.journeys.people import LONG_QUESTION, QUESTION, TIMEOUT_S, Prices, User, asking
from tests.running_stack import RunningStack

MESSAGES: Any = list(QUESTION)
SIGNUP_CREDITS = Decimal(100)
ATTEMPTS_MAX = 5


def test_the_demo_key_that_make_up_prints_gets_an_answer(stack: RunningStack) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_key, timeout=TIMEOUT_S)
    answer = client.chat.completions.create(model="chat-mini", messages=MESSAGES, max_tokens=50)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == "chat-mini"
    client.close()


def test_the_sdk_completes_and_reads_the_receipt(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="chat-mini", messages=MESSAGES, max_completion_tokens=8)
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("chat-mini-")
    assert answer.model_extra is not None
    receipt = answer.model_extra["tollgate"]
    assert receipt["build"] == answer.system_fingerprint
    assert 0 < Decimal(receipt["settled"]) <= Decimal(receipt["held"])


async def test_the_async_sdk_streams(async_openai_client: openai.AsyncOpenAI) -> None:
    stream = await async_openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({(c.id, c.created, c.system_fingerprint) for c in chunks}) == 1


@pytest.mark.usefixtures("slow_engine")
def test_a_stream_arrives_as_it_is_generated(user: User) -> None:
    """While the first tokens are read, the hold is still open: the engine has not finished."""
    body = asking(stream=True, messages=LONG_QUESTION)
    for _ in range(ATTEMPTS_MAX):  # a machine that is very busy may not come to slow its engine
        blocks, held_meanwhile = 0, Decimal(0)
        with user.api.stream("POST", "/v1/chat/completions", json=body) as answer:
            for block in answer.iter_raw():
                if b'"content":"' in block and b'"role"' not in block:
                    held_meanwhile = user.wallet().held if blocks == 0 else held_meanwhile
                    blocks += 1
        if held_meanwhile > 0:
            break
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert blocks > 5, "the stream came in a few large pieces"
    assert held_meanwhile > 0


def test_the_models_are_listed_with_context_and_prices(openai_client: openai.OpenAI) -> None:
    [model] = [m for m in openai_client.models.list() if m.id == "chat-mini"]
    assert model.object == "model"
    assert model.model_extra is not None
    assert model.model_extra["context_window"] >= 512
    assert {b["state"] for b in model.model_extra["builds"]} == {"ready"}
    assert openai_client.models.retrieve("chat-mini") == model


def test_the_wallet_shows_exactly_the_settled_price(user: User, prices: Prices) -> None:
    assert user.wallet().balance == SIGNUP_CREDITS
    spent = Decimal(0)
    for body in ({"max_tokens": 10}, {}, {"max_completion_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}):
        answer = user.ask(**body).json()
        assert Decimal(answer["tollgate"]["settled"]) == prices.cost(answer["usage"])
        spent += prices.cost(answer["usage"])
        wallet = user.wallet()
        assert wallet.balance == wallet.available == SIGNUP_CREDITS - spent
        assert wallet.held == 0


def test_a_stream_costs_what_its_usage_says(user: User, prices: Prices) -> None:
    stream = user.openai().chat.completions.create(
        model="chat-mini", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, max_tokens=40
    )
    last = list(stream)[-1]
    assert last.usage is not None
    cost = prices.cost(last.usage.model_dump())
    assert last.model_extra is not None
    assert Decimal(last.model_extra["tollgate"]["settled"]) == cost
    assert user.wallet().balance == SIGNUP_CREDITS - cost


def test_the_settlement_is_in_the_wallets_history(user: User, prices: Prices) -> None:
    answer = user.ask(max_tokens=5).json()
    listed = user.pages("/api/v1/billing/transactions")
    [settled] = [t for t in listed if t["hold_id"] == answer["tollgate"]["hold_id"]]
    assert Decimal(settled["amount"]) == -prices.cost(answer["usage"])
    assert settled["build"] == answer["system_fingerprint"]


def test_stop_strings_and_seeds_work(user: User) -> None:
    same = [user.ask(seed=7, temperature=1.0, max_tokens=12).json() for _ in range(2)]
    texts = [a["choices"][0]["message"]["content"] for a in same]
    assert texts[0] == texts[1]
    words = re.findall("[A-Za-z]{2,}", texts[0])
    assert words, f"a text without a word: {texts[0]!r}"
    word = words[0]
    cut = user.ask(seed=7, temperature=1.0, max_tokens=12, stop=[word]).json()["choices"][0]
    assert word not in cut["message"]["content"]
    assert cut["finish_reason"] == "stop"


def test_the_gateway_serves_one_openapi_document_with_chat_in_it(stack: RunningStack) -> None:
    document = httpx.get(f"{stack.url}/openapi.json", timeout=TIMEOUT_S).json()
    assert "/v1/chat/completions" in document["paths"]
    assert "/v1/models" in document["paths"]
    assert httpx.get(f"{stack.url}/docs", timeout=TIMEOUT_S).status_code == 200
