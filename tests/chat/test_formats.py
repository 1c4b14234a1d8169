"""Choices, log probabilities, documents and calls of tools: what OpenAI's clients get, and what the engine is asked."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.chat.domain.answers import answer
from services.chat.domain.request import ChatRequest, Tool, ToolUse
from services.chat.domain.schema import Constraint
from shared.errors import BadGateway, InvalidRequest
from tests.chat.conftest import Chat
from tests.chat.doubles import Item, Script, chunk
from tests.chat.test_completions import events

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"type": "integer"}}, "required": ["zone"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of now.", "parameters": CITY}},
    {"type": "function", "function": {"name": "time", "parameters": TIME}},
]


def saying(text: str, reason: str = "stop", size: int = 3) -> Script:
    """An engine that writes a text, some characters at a time."""

    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for i, piece in enumerate(pieces, 1):
            yield chunk(piece, i)
        yield chunk("", len(pieces), reason)

    return script


async def test_choices_are_generated_each_by_itself_and_their_usage_is_the_sum(chat: Chat) -> None:
    body = (await chat.complete(n=3, max_tokens=5, seed=10)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in body["choices"]} == {"one two three"}
    assert body["usage"]["completion_tokens"] == 9
    assert body["usage"]["prompt_tokens"] == 21
    assert sorted(r["seed"] for r in chat.engine.generated) == [10, 11, 12]
    [hold] = chat.ledger.holds
    assert (hold.worst_case.input_tokens, hold.worst_case.output_tokens) == (42, 15)
    [settled] = chat.ledger.settled
    assert (settled.usage.input_tokens, settled.usage.output_tokens) == (21, 9)


async def test_a_stream_of_choices_tells_each_by_its_index(chat: Chat) -> None:
    chunks = events((await chat.complete(n=2, stream=True, stream_options={"include_usage": True})).text)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content") or "" for c in own) == "one two three"
        assert own[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 6


async def test_the_wallet_that_does_not_cover_a_token_for_each_choice_is_refused(chat: Chat) -> None:
    chat.ledger.covered = 2
    answer_ = await chat.complete(n=3)
    assert (answer_.status_code, answer_.json()["error"]["code"]) == (402, "insufficient_quota")
    assert chat.engine.generated == []


async def test_one_choice_that_fails_ends_all(chat: Chat) -> None:
    async def script(body: dict[str, Any]) -> AsyncIterator[Item]:
        yield chunk("one", 1)
        if body.get("seed") == 1:
            yield b"rubbish"
        yield chunk("", 1, "stop")

    chat.engine.chat = script
    answer_ = await chat.complete(n=2, seed=0)
    assert (answer_.status_code, answer_.json()["error"]["code"]) == (502, "engine_error")


async def test_log_probabilities_have_openais_members_only(chat: Chat) -> None:
    token = {"id": 5, "token": "one", "bytes": [111, 110, 101], "logprob": -0.5}

    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        item = chunk("one", 1)
        assert isinstance(item, dict)
        item["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
        yield item
        yield chunk("", 1, "length")

    chat.engine.chat = script
    shown = {k: v for k, v in token.items() if k != "id"}
    body = (await chat.complete(logprobs=True, top_logprobs=1)).json()
    assert body["choices"][0]["logprobs"] == {"content": [{**shown, "top_logprobs": [shown]}], "refusal": None}
    assert chat.engine.generated[0]["top_logprobs"] == 1
    [streamed] = [
        c["choices"][0]["logprobs"]
        for c in events((await chat.complete(logprobs=True, top_logprobs=1, stream=True)).text)
        if c["choices"][0]["logprobs"]
    ]
    assert streamed == body["choices"][0]["logprobs"]
    [bare] = (await chat.complete(logprobs=True)).json()["choices"]
    assert bare["logprobs"]["content"] == [{**shown, "top_logprobs": []}]
    assert chat.engine.generated[-1]["top_logprobs"] == 1


async def test_a_document_is_asked_of_the_engine_and_checked(chat: Chat) -> None:
    chat.engine.chat = saying('{"city": "Oslo"}')
    body = (await chat.complete(response_format=FORMAT)).json()
    assert json.loads(body["choices"][0]["message"]["content"]) == {"city": "Oslo"}
    asked = chat.engine.generated[0]["response_format"]
    assert asked == {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}


@pytest.mark.parametrize("text", ['{"city": 5}', '{"city": "Oslo"', '"Oslo"', '{"city": "Oslo"} and more', ""])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_document_is_an_error_never_an_answer(chat: Chat, text: str, stream: bool) -> None:
    chat.engine.chat = saying(text)
    answer_ = await chat.complete(response_format=FORMAT, stream=stream)
    if stream:
        last = answer_.text.removesuffix("\n\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "output_format_violated"
        assert "[DONE]" not in answer_.text
        assert '"finish_reason":"stop"' not in answer_.text
    else:
        assert (answer_.status_code, answer_.json()["error"]["code"]) == (502, "output_format_violated")


async def test_a_document_that_was_cut_short_says_so(chat: Chat) -> None:
    chat.engine.chat = saying('{"city": "Os', "length")
    body = (await chat.complete(response_format=FORMAT, max_tokens=4)).json()
    assert body["choices"][0]["finish_reason"] == "length"


async def test_json_object_is_any_object_and_nothing_else(chat: Chat) -> None:
    chat.engine.chat = saying('{"a": [1]}')
    assert (await chat.complete(response_format={"type": "json_object"})).status_code == 200
    chat.engine.chat = saying("[1]")
    assert (await chat.complete(response_format={"type": "json_object"})).status_code == 502


@pytest.mark.parametrize("size", [1, 4, 1000])
async def test_a_call_that_must_happen_is_made_of_a_document(chat: Chat, size: int) -> None:
    chat.engine.chat = saying('{"name": "time", "arguments": {"zone": 2} }', size=size)
    body = (await chat.complete(tools=TOOLS, tool_choice="required")).json()
    [choice] = body["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "time", "arguments": '{"zone": 2}'}}
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    schema = chat.engine.generated[0]["response_format"]["json_schema"]["schema"]
    assert [s["properties"]["name"] for s in schema["anyOf"]] == [{"const": "weather"}, {"const": "time"}]
    assert [t["function"]["name"] for t in chat.engine.generated[0]["tools"]] == ["weather", "time"]


@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_a_named_call_streams_its_arguments_by_index(chat: Chat, size: int) -> None:
    chat.engine.chat = saying('{"city": "O}slo"}', size=size)
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = events((await chat.complete(tools=TOOLS, tool_choice=named, stream=True)).text)
    deltas = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert {d["index"] for d in deltas} == {0}
    assert deltas[0]["function"] == {"name": "weather", "arguments": ""}
    assert deltas[0]["id"].startswith("call_")
    assert "".join(d["function"]["arguments"] for d in deltas) == '{"city": "O}slo"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "text", ['{"name": "nothing", "arguments": {}}', '{"name": "time", "arguments": {}}', '{"name": "time"}', "no"]
)
async def test_a_wrong_call_is_an_error(chat: Chat, text: str) -> None:
    chat.engine.chat = saying(text)
    answer_ = await chat.complete(tools=TOOLS, tool_choice="required")
    assert (answer_.status_code, answer_.json()["error"]["code"]) == (502, "output_format_violated")


def calling(name: str, *arguments: str) -> Script:
    """An engine that knows tools and calls one."""

    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        for i, part in enumerate(("", *arguments)):
            function = {"arguments": part} if i else {"name": name, "arguments": ""}
            delta = {"tool_calls": [{"index": 0, "function": function}]}
            if not i:
                delta["tool_calls"][0] |= {"id": "abc", "type": "function"}
            item = chunk("", i + 1)
            assert isinstance(item, dict)
            item["choices"][0]["delta"] = delta
            yield item
        yield chunk("", len(arguments) + 1, "tool_calls")

    return script


async def test_a_call_that_the_engine_chose_passes_through_checked(chat: Chat) -> None:
    chat.engine.chat = calling("weather", '{"city":', ' "Oslo"}')
    [choice] = (await chat.complete(tools=TOOLS, parallel_tool_calls=False)).json()["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    ]
    assert choice["finish_reason"] == "tool_calls"
    asked = chat.engine.generated[0]
    assert (asked["tool_choice"], asked["parallel_tool_calls"]) == ("auto", False)
    chat.engine.chat = calling("weather", '{"city": 5}')
    assert (await chat.complete(tools=TOOLS)).status_code == 502
    chat.engine.chat = calling("rm", "{}")
    assert (await chat.complete(tools=TOOLS)).status_code == 502


async def test_a_conversation_with_calls_reaches_the_engine_as_it_was(chat: Chat) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "22", "tool_call_id": "call_1"},
    ]
    assert (await chat.complete(messages=messages, tools=TOOLS)).status_code == 200
    assert chat.engine.generated[0]["messages"] == [{"role": "system", "content": "Be brief."}, *messages[1:]]


@pytest.mark.parametrize(("plan", "tier", "served"), [
    ("default", "priority", (2, "default")), ("gold", "priority", (1, "priority")), ("default", "flex", (3, "flex")),
    ("default", "auto", (2, "default")),
])  # fmt: skip
async def test_the_service_tier_is_the_engines_priority(
    chat: Chat, plan: str, tier: str, served: tuple[int, str]
) -> None:
    async with chat.client(plan=plan) as client:
        body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "service_tier": tier}
        answered = (await client.post("/v1/chat/completions", json=body)).json()
    assert (chat.engine.parameters[-1]["tg_priority"], answered["service_tier"]) == served


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "(?=a)b"},
        {"enum": [10**30]},
        {"type": "object", "description": "x" * 40_000},
        {"anyOf": [{"const": i} for i in range(1_500)]},
    ],
    ids=str,
)
def test_a_schema_that_would_harm_the_engine_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Constraint(schema, "tools")
    assert (refused.value.code, refused.value.param) == ("invalid_schema", "tools")


def test_what_the_engine_cannot_bound_is_checked_and_not_sent() -> None:
    constraint = Constraint(
        {
            "type": "object",
            "properties": {
                "a": {"type": "string", "minLength": 3, "maxLength": 10**6, "pattern": "^(x+)+$"},
                "b": {"allOf": [{"$ref": "#/$defs/b"}], "not": {"const": "z"}},
                "c": {"$ref": "#"},
            },
            "$defs": {"b": {"type": "string", "pattern": "^[a-z]*$"}},
        },
        "tools",
    )
    assert constraint.for_engine == {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 3}, "b": {"$ref": "#/$defs/b"}, "c": {}},
        "$defs": {"b": {"type": "string", "pattern": "^[a-z]*$"}},
    }
    assert constraint.is_met_by('{"a": "xxxx", "b": "q", "c": {"a": "xxx"}}')
    assert not constraint.is_met_by('{"a": "xxxy"}')
    assert not constraint.is_met_by('{"b": "z"}')
    assert not constraint.is_met_by('{"c": {"a": 1}}')


def test_definitions_of_several_tools_do_not_meet() -> None:
    def recursive(kind: str) -> Constraint:
        node = {"type": "object", "properties": {"v": {"type": kind}, "next": {"$ref": "#/$defs/n"}}}
        return Constraint({"$defs": {"n": node}, "$ref": "#/$defs/n"}, "tools")

    use = ToolUse((Tool("a", None, recursive("string")), Tool("b", None, recursive("integer"))), "required")
    written = answer(ChatRequest("m", (), tool_use=use))
    deltas = list(written.take({"content": '{"name": "b", "arguments": {"v": 1, "next": {"v": "x"}}}'}))
    assert deltas
    with pytest.raises(BadGateway):
        written.end("stop")
