"""Bare prompts, and counting before paying."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.chat.conftest import Chat
from tests.chat.doubles import Item, chunk
from tests.chat.test_completions import events


async def send(chat: Chat, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    async with chat.client() as client:
        return await client.post(path, json={"model": "small", **body})


async def test_a_prompt_goes_on_without_a_template(chat: Chat) -> None:
    body = (await send(chat, prompt="Count: zero", max_tokens=5, stop="x")).json()
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert body["choices"] == [{"index": 0, "text": "one two three", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 10
    assert body["tollgate"]["build"] == "small-a"
    [asked] = chat.engine.generated
    assert asked == {"model": "small", "prompt": "Count: zero", "max_tokens": 5, "stop": ["x"]}


async def test_the_older_default_is_sixteen_tokens(chat: Chat) -> None:
    await send(chat, prompt=["x"])
    assert chat.engine.generated[0]["max_tokens"] == 16


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_of_text(chat: Chat, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = events((await send(chat, prompt="0", stream=True, echo=True, n=2, **options)).text)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == "0one two three"
        assert own[-1]["finish_reason"] == "stop"
    assert chunks[-1]["tollgate"]["tokens"]["output"] == 6
    assert (chunks[-1].get("usage") is not None) == usage


async def test_log_probabilities_have_the_older_form(chat: Chat) -> None:
    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        for i, word in enumerate(("one", " two"), 1):
            item = chunk(word, i)
            assert isinstance(item, dict)
            top = [{"token": "x", "logprob": -1.0}]
            item["choices"][0]["logprobs"] = {"content": [{"token": word, "logprob": -0.5, "top_logprobs": top}]}
            yield item
        yield chunk("", 2, "length")

    chat.engine.chat = script
    [choice] = (await send(chat, prompt="ab", logprobs=1, echo=True)).json()["choices"]
    assert choice["text"] == "abone two"
    assert choice["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"x": -1.0}] * 2,
        "text_offset": [2, 5],
    }


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
        ({"prompt": [1, 2]}, "invalid_value", "prompt"),
        ({"prompt": "x" * 2_001}, "string_above_max_length", "prompt"),
        ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "logprobs": 6}, "invalid_value", "logprobs"),
    ],
    ids=str,
)
async def test_a_bad_field_is_named(chat: Chat, body: dict[str, Any], code: str, param: str) -> None:
    refused = await send(chat, **body)
    assert (refused.status_code, refused.json()["error"]["code"], refused.json()["error"]["param"]) == (
        400,
        code,
        param,
    )


@pytest.mark.parametrize("body", [{"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x"}], ids=str)
async def test_a_count_costs_nothing_and_says_what_the_prompt_would_cost(chat: Chat, body: dict[str, Any]) -> None:
    counted = (await send(chat, "/v1/tokenize", **body)).json()
    assert counted == {
        "object": "tokenization",
        "model": "small",
        "count": 7,
        "max_model_len": 100,
        "cost": {"prompt": "0.0000105", "per_thousand_output_tokens": "0.002"},
    }
    assert chat.engine.requests == [{"op": "count", **body}]
    assert chat.ledger.holds == []


async def test_a_count_of_nothing_is_refused(chat: Chat) -> None:
    bad: list[dict[str, Any]] = [{}, {"messages": []}, {"prompt": 5}]
    for body in bad:
        assert (await send(chat, "/v1/tokenize", **body)).status_code == 400
    assert (await send(chat, "/v1/tokenize", prompt="x", model="none")).status_code == 404
