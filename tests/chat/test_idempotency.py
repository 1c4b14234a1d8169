"""Idempotency keys: sent again, answered again, generated and paid for once."""

import asyncio
from typing import Any

import httpx
import pytest

from shared.errors import Unavailable
from tests.chat.conftest import Chat, asking, told, until
from tests.chat.doubles import EngineError, chunk
from tests.chat.test_completions import events
from tests.chat.test_disconnect import endless
from tests.chat.test_failures import failing
from tests.chat.test_formats import TOOLS, saying

HEADER = "idempotency-key"


async def send(chat: Chat, key: str, identity: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
    async with chat.client(**(identity or {})) as client:
        return await client.post("/v1/chat/completions", json=asking(**body), headers={HEADER: key})


async def test_a_retry_gets_the_same_answer_and_pays_nothing(chat: Chat) -> None:
    first = await send(chat, "same")
    again = await send(chat, "same")
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (len(chat.ledger.holds), len(chat.engine.generated)) == (1, 1)


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_is_told_again(chat: Chat, usage: bool) -> None:
    chat.engine.chat = saying('{"name": "time", "arguments": {"zone": 2}}')
    body: dict[str, Any] = {"stream": True, "n": 2, "tools": TOOLS, "tool_choice": "required"}
    if usage:
        body["stream_options"] = {"include_usage": True}
    first, again = [events((await send(chat, f"stream-{usage}", **body)).text) for _ in range(2)]
    assert first[0] == again[0]
    assert first[-1] == again[-1]
    assert len(chat.ledger.holds) == 1


async def test_text_is_told_again_in_one_piece(chat: Chat) -> None:
    first, again = [events((await send(chat, "pieces", stream=True)).text) for _ in range(2)]
    texts = ["".join(c["choices"][0]["delta"].get("content", "") for c in one) for one in (first, again)]
    assert texts == ["one two three"] * 2
    assert len(again) < len(first)


async def test_another_body_is_refused(chat: Chat) -> None:
    await send(chat, "other")
    refused = await send(chat, "other", max_tokens=3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_mismatch")


async def test_a_key_is_its_callers_own(chat: Chat) -> None:
    for identity in ({}, {"key_id": "key2"}, {"org_id": "org2"}):
        assert (await send(chat, "own", identity)).status_code == 200
    assert len(chat.engine.generated) == 3


async def test_while_the_first_runs_a_second_is_told_to_come_again(chat: Chat) -> None:
    go_on = asyncio.Event()

    async def waiting(_: dict[str, Any]) -> Any:
        yield chunk("one", 1)
        await go_on.wait()
        yield chunk("", 1, "stop")

    chat.engine.chat = waiting
    first = asyncio.create_task(send(chat, "busy"))

    async def generating() -> bool:
        return bool(chat.engine.generated)

    await until(generating)
    second = await send(chat, "busy")
    assert (second.status_code, second.json()["error"]["code"]) == (409, "request_in_progress")
    assert second.headers["retry-after"] == "1"
    go_on.set()
    assert (await first).json() == (await send(chat, "busy")).json()
    assert len(chat.ledger.holds) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_is_there_for_a_client_that_lost_its_connection(chat: Chat, stream: bool) -> None:
    release = asyncio.Event()

    async def slow(_: dict[str, Any]) -> Any:
        yield chunk("one", 1)
        await release.wait()
        yield chunk(" two", 2)
        yield chunk("", 2, "stop")

    chat.engine.chat, key = slow, f"lost-{stream}"
    asked = asyncio.create_task(send(chat, key, stream=stream))

    async def begun() -> bool:
        return chat.engine.sent > 0

    await until(begun)
    asked.cancel()
    release.set()

    async def settled() -> bool:
        return bool(chat.ledger.settled)

    await until(settled)
    while (answer := await send(chat, key, stream=stream)).status_code == 409:  # paid, and not quite kept yet
        await asyncio.sleep(0.01)
    assert answer.status_code == 200
    assert "two" in answer.text
    assert (len(chat.ledger.settled), chat.ledger.settled[0].finish_reason) == (1, "stop")
    assert len(chat.engine.generated) == 1


async def test_requests_whose_clients_left_are_bounded_for_each_key(chat: Chat) -> None:
    release = asyncio.Event()

    async def slow(_: dict[str, Any]) -> Any:
        yield chunk("one", 1)
        await release.wait()
        yield chunk("", 1, "stop")

    chat.engine.chat = slow
    for number in (1, 2):
        asked = asyncio.create_task(send(chat, f"left-{number}", stream=True))

        async def begun(number: int = number) -> bool:
            return chat.engine.sent >= number

        await until(begun)
        asked.cancel()
        await asyncio.wait((asked,))

    async def is_refused() -> bool:  # once chat has noticed that both have gone
        answer = await send(chat, "left-probe", max_tokens=10**9)
        return answer.status_code == 429

    await until(is_refused)
    refused = await send(chat, "left-3")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
    assert refused.headers["retry-after"] == "1"
    release.set()
    assert (await send(chat, "left-3", {"key_id": "another"})).status_code == 200
    await until(chat.is_idle)
    assert (await send(chat, "left-3")).status_code == 200
    assert (await send(chat, "left-1", stream=True)).headers["idempotent-replayed"] == "true"


async def test_without_a_key_leaving_still_stops_the_engine(chat: Chat) -> None:
    chat.engine.chat = endless
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))
        await told(chat.engine.begun)
        asked.cancel()
        await told(chat.engine.stopped)


async def test_a_request_that_failed_is_tried_anew(chat: Chat) -> None:
    chat.engine.chat = failing(EngineError("queue_full"))
    assert (await send(chat, "failed")).status_code == 503
    chat.ledger.refusal = Unavailable()
    assert (await send(chat, "failed")).status_code == 503
    chat.engine.reset()
    chat.ledger.reset()
    assert (await send(chat, "failed")).status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_key_of_another_form_is_refused(chat: Chat, key: str) -> None:
    refused = await send(chat, key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_idempotency_key")


async def test_of_many_at_once_one_is_generated(chat: Chat) -> None:
    answers = await asyncio.gather(*(send(chat, "crowd") for _ in range(20)))
    assert {a.status_code for a in answers} <= {200, 409}
    assert 200 in {a.status_code for a in answers}
    assert (len(chat.engine.generated), len(chat.ledger.holds)) == (1, 1)


async def test_a_header_that_is_refused_leaves_the_key_free(chat: Chat) -> None:
    async with chat.client() as client:
        headers = {HEADER: "misspelt", "tollgate-cache": "yes"}
        refused = await client.post("/v1/chat/completions", json=asking(), headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tollgate-cache")
    assert (await send(chat, "misspelt")).status_code == 200
