"""A key's tokens per minute: reserved before the engine starts, given back after, told in headers."""

from typing import Any

import httpx

from shared.ids import uuid7
from tests.chat.conftest import Chat, asking


def limited(quota: int) -> dict[str, Any]:
    return {"tokens_per_minute": quota, "limit_id": str(uuid7()), "org_id": str(uuid7())}


async def send(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=asking(**body))


async def test_what_was_not_used_is_given_back(chat: Chat) -> None:
    async with chat.client(**limited(75)) as client:
        for number in range(3):  # each may use 54 tokens and uses 10
            answer = await send(client)
            assert answer.status_code == 200, number
            assert answer.headers["x-ratelimit-limit-tokens"] == "75"
        assert int((await send(client, max_tokens=1)).headers["x-ratelimit-remaining-tokens"]) <= 75 - 30


async def test_beyond_the_limit_a_request_waits_and_holds_nothing(chat: Chat) -> None:
    async with chat.client(**limited(30)) as client:
        assert (await send(client, max_tokens=10)).status_code == 200
        assert (await send(client, max_tokens=3)).status_code == 200
        holds = len(chat.ledger.holds)
        refused = await send(client, max_tokens=20)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-limit-tokens"] == "30"
        assert len(chat.ledger.holds) == holds


async def test_what_never_fits_is_a_bad_request(chat: Chat) -> None:
    async with chat.client(**limited(30)) as client:
        refused = await send(client, max_tokens=50)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "tokens_above_limit")
        assert refused.json()["error"]["param"] == "max_tokens"


async def test_a_key_without_a_limit_has_no_such_headers(chat: Chat) -> None:
    assert "x-ratelimit-limit-tokens" not in (await chat.complete()).headers
