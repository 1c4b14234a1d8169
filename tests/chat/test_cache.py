"""The response cache: asked for, deterministic, its organisation's own, and paid as a cached prompt."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.chat.conftest import Chat, asking, until
from tests.chat.doubles import chunk
from tests.chat.test_completions import events
from tests.chat.test_failures import failing

USE = {"tollgate-cache": "use"}


async def send(chat: Chat, org: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    async with chat.client(org_id=org) as client:
        return await client.post(
            "/v1/chat/completions", json=asking(**body), headers=USE if headers is None else headers
        )


async def test_a_hit_is_the_same_answer_for_the_price_of_a_cached_prompt(chat: Chat) -> None:
    first = await send(chat, "cache-a", temperature=0)
    again = await send(chat, "cache-a", temperature=0)
    assert [r.headers["tollgate-cache"] for r in (first, again)] == ["miss", "hit"]
    assert first.json()["choices"] == again.json()["choices"]
    assert first.json()["id"] != again.json()["id"]
    assert len(chat.engine.generated) == 1
    assert again.json()["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 7},
    }  # fmt: skip
    assert again.json()["tollgate"]["cached"] is True
    settled = chat.ledger.settled[1]
    assert (settled.usage.input_tokens, settled.usage.cached_input_tokens, settled.usage.output_tokens) == (7, 7, 0)
    assert (settled.build, settled.finish_reason) == ("small-a", "cached")


async def test_a_hit_may_be_streamed(chat: Chat) -> None:
    await send(chat, "cache-b", seed=1)
    chunks = events((await send(chat, "cache-b", seed=1, stream=True)).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "one two three"
    assert chunks[-1]["tollgate"]["cached"] is True
    assert len(chat.engine.generated) == 1


async def test_who_never_reads_the_last_event_of_a_hit_has_paid_for_it(chat: Chat) -> None:
    await send(chat, "cache-g", temperature=0)

    async def receives_no_word(message: Any) -> None:
        if b'"content":"one' in message.get("body", b""):
            await asyncio.Event().wait()

    async with chat.client(org_id="cache-g") as client:
        asked = client.build_request(
            "POST", "/v1/chat/completions", json=asking(temperature=0, stream=True), headers=USE
        )
    messages = iter([{"type": "http.request", "body": asked.content}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": asked.url.path,
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in asked.headers.raw],
    }
    await chat.app(scope, receive, receives_no_word)
    await until(chat.ledger.is_quiet)
    assert [s.finish_reason for s in chat.ledger.settled] == ["stop", "cached"]
    assert chat.ledger.voided == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"temperature": 0}, {"temperature": 0, "max_tokens": 5}),
        ({"seed": 1}, {"seed": 2}),
        ({"seed": 1}, {"seed": 1, "messages": [{"role": "user", "content": "Other."}]}),
        ({"seed": 1}, {"seed": 1, "response_format": {"type": "json_object"}}),
    ],
    ids=str,
)
async def test_another_question_is_another_answer(chat: Chat, first: dict[str, Any], second: dict[str, Any]) -> None:
    org = f"cache-{hash(str(second))}"
    await send(chat, org, **first)
    await send(chat, org, **second)
    assert len(chat.engine.generated) == 2


async def test_nobody_elses_answers_and_none_unasked(chat: Chat) -> None:
    await send(chat, "cache-c", temperature=0)
    await send(chat, "cache-d", temperature=0)
    await send(chat, "cache-c", {}, temperature=0)
    await send(chat, "cache-c")
    await send(chat, "cache-c")
    assert len(chat.engine.generated) == 5


async def test_what_failed_is_not_kept(chat: Chat) -> None:
    chat.engine.chat = failing(chunk("one", 1), b"rubbish")
    assert (await send(chat, "cache-e", temperature=0)).status_code == 502
    chat.engine.reset()
    assert (await send(chat, "cache-e", temperature=0)).headers["tollgate-cache"] == "miss"


async def test_the_header_has_one_value(chat: Chat) -> None:
    refused = await send(chat, "cache-f", {"tollgate-cache": "yes"}, temperature=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tollgate-cache")
