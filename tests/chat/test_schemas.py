"""OpenAI's body: what is taken, what is refused, and by which name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chat.domain.request import ChatRequest, Limits, Message, Priority, Tool, ToolCall, ToolUse
from services.chat.domain.schema import Constraint
from services.chat.routes.bodies import NEUTRAL
from services.chat.routes.schemas import ChatCompletionBody, parse
from shared.errors import InvalidRequest

LIMITS = Limits(
    max_tokens_default=40,
    messages_max=5,
    prompt_chars_max=100,
    choices_max=4,
    generations_max=4,
    count_timeout_s=1,
    first_chunk_timeout_s=1,
    chunk_timeout_s=1,
    generation_timeout_s=1,
    send_timeout_s=1,
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
HELLO = {"role": "user", "content": "Hello"}


def asked(**body: Any) -> ChatRequest:
    return parse(json.dumps({"model": "m", "messages": [HELLO], **body}).encode(), LIMITS)


def refused(content: bytes) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as e:
        parse(content, LIMITS)
    assert e.value.status == 400
    return e.value.code, e.value.param


def test_everything_that_is_served_arrives() -> None:
    request = asked(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
                "name": "ann",
            },
            {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "audio": None},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "22", "tool_call_id": "call_1"},
        ],
        max_completion_tokens=9,
        temperature=2,
        top_p=0.5,
        presence_penalty=-2,
        frequency_penalty=2.0,
        stop=["a", "b"],
        seed=-1,
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"17": -100, "18": 0.5},
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        tools=[{"type": "function", "function": {"name": "weather", "description": "Of now.", "parameters": CITY}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        service_tier="flex",
        store=True,
        metadata={"a": "b"},
    )
    assert request == ChatRequest(
        model="m",
        messages=(
            Message("system", "Be brief."),
            Message("user", "Hello", "ann"),
            Message("assistant", "Yes?"),
            Message("assistant", None, tool_calls=(ToolCall("call_1", "weather", "{}"),)),
            Message("tool", "22", tool_call_id="call_1"),
        ),
        max_tokens=9,
        n=2,
        sampling={
            "temperature": 2.0,
            "top_p": 0.5,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
            "stop": ["a", "b"],
            "seed": -1,
            "logprobs": True,
            "top_logprobs": 3,
            "logit_bias": {"17": -100.0, "18": 0.5},
        },
        document=Constraint(CITY, "p"),
        tool_use=ToolUse((Tool("weather", "Of now.", Constraint(CITY, "p")),), "required", "weather", parallel=False),
        stream=True,
        include_usage=True,
        priority=Priority.FLEX,
        store=True,
        metadata={"a": "b"},
    )


def test_null_everywhere_is_the_default() -> None:
    optional = {name: None for name in ChatCompletionBody.model_fields if name not in ("model", "messages")}
    assert asked(**optional) == asked()


def test_unknown_fields_and_hints_are_tolerated() -> None:
    assert asked(user="u", frobnicate=[1], safety_identifier="x", prompt_cache_key="y") == asked()


@pytest.mark.parametrize("name", sorted(set(NEUTRAL) & set(ChatCompletionBody.model_fields)))
def test_fields_that_are_not_served_yet_are_refused_by_name_unless_neutral(name: str) -> None:
    for value in NEUTRAL[name]:
        assert asked(**{name: value}) == asked()
    with pytest.raises(InvalidRequest) as e:
        asked(**{name: {"something": "else"}})
    assert (e.value.code, e.value.param) == ("unsupported_parameter", name)
    assert name in e.value.message


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"n": 5}, "invalid_value", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias.a.[key]"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
            "invalid_schema",
            "response_format.json_schema.schema",
        ),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "invalid_value", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "invalid_value",
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": "http://a/b"}}}]},
            "invalid_schema",
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "perhaps"}, "invalid_value", "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {**WEATHER, "function": {"name": "b"}}}, "invalid_value", "tool_choice"),
        ({"service_tier": "gold"}, "invalid_value", "service_tier"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "invalid_value", "metadata"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
        ({"messages": [HELLO, {"role": "function", "content": "x"}]}, "unsupported_parameter", "messages[1].role"),
        ({"messages": [{**HELLO, "tool_calls": [1]}]}, "invalid_type", "messages[0].tool_calls[0]"),
        ({"messages": [{**HELLO, "tool_calls": [CALL]}]}, "invalid_value", "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "x"}, "invalid_type", "messages"),
        ({"messages": ["x"]}, "invalid_type", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "invalid_value", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "missing_required_parameter",
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "invalid_type",
            "messages[0].content[0].text",
        ),
        ({"messages": [HELLO] * 6}, "array_above_max_length", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "string_above_max_length", "messages"),
        ({"messages": [{**HELLO, "name": "x" * 65}]}, "invalid_value", "messages[0].name"),
        ({"model": 5}, "invalid_type", "model"),
        ({"model": ""}, "invalid_value", "model"),
        ({"model": "m" * 257}, "invalid_value", "model"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"max_completion_tokens": 2**63}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": [""]}, "invalid_value", "stop[0]"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"stop": 1}, "invalid_type", "stop"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"seed": 1.5}, "invalid_type", "seed"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(body: dict[str, Any], code: str, param: str) -> None:
    assert refused(json.dumps({"model": "m", "messages": [HELLO], **body}).encode()) == (code, param)


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"null", "invalid_type", None),
        (b"{}", "missing_required_parameter", "model"),
        (b'{"model": "m"}', "missing_required_parameter", "messages"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "invalid_value",
            "temperature",
        ),
    ],
)
def test_what_is_no_request_at_all_is_refused(content: bytes, code: str, param: str | None) -> None:
    assert refused(content) == (code, param)


_NAMES = st.sampled_from(["model", "messages", "role", "content", "stop", "n", "stream_options", "type", "text"])
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_NAMES, inner)))
def test_whatever_is_sent_is_taken_or_refused_but_never_crashes(value: Any) -> None:
    for body in (value, {"model": "m", "messages": value}, {"model": "m", "messages": [HELLO], "stop": value}):
        try:
            parse(json.dumps(body).encode(), LIMITS)
        except InvalidRequest:
            continue


def test_a_refusal_never_echoes_what_was_sent() -> None:
    secret = "do-not-repeat-me"
    for body in ({"temperature": secret}, {"messages": secret}, {"messages": [{"role": secret, "content": "x"}]}):
        with pytest.raises(InvalidRequest) as e:
            asked(**body)
        assert secret not in str(e.value)
