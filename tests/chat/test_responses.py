"""/v1/responses as OpenAI's own SDK reads it, and /chat/message."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from shared.errors import PaymentRequired
from shared.identity import HEADER
from tests.chat.conftest import Chat
from tests.chat.doubles import EngineError, chunk
from tests.chat.test_failures import failing
from tests.chat.test_formats import CITY, saying

FUNCTION: Any = {"type": "function", "name": "weather", "description": "Of now.", "parameters": CITY, "strict": True}


@pytest.fixture
async def sdk(chat: Chat) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official SDK, as the gateway's signature."""
    headers = {}
    async with chat.client(org_id="responses") as client:
        headers[HEADER] = client.headers[HEADER]
    async with openai.AsyncOpenAI(
        base_url=f"{chat.url}/v1", api_key="none", default_headers=headers, max_retries=0
    ) as client_:
        yield client_


async def test_a_response_has_its_text_usage_and_receipt(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="small", input="Hello", instructions="Be brief.", max_output_tokens=9)
    assert made.id.startswith("resp_")
    assert (made.status, made.output_text) == ("completed", "one two three")
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (7, 3)
    assert made.to_dict()["tollgate"]["build"] == "small-a"  # type: ignore[index]
    [asked] = chat.engine.generated
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert asked["max_tokens"] == 9


async def test_a_response_is_kept_and_the_next_goes_on(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    first = await sdk.responses.create(model="small", input="Hello", instructions="Only now.", metadata={"a": "b"})
    kept = await sdk.responses.retrieve(first.id)
    assert kept.to_dict() == first.to_dict()
    second = await sdk.responses.create(
        model="small",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "And?"}]}],
        previous_response_id=first.id,
    )
    third = await sdk.responses.create(model="small", input="So?", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    said = {"role": "assistant", "content": "one two three"}
    assert chat.engine.generated[-1]["messages"] == [
        {"role": "user", "content": "Hello"}, said, {"role": "user", "content": "And?"}, said,
        {"role": "user", "content": "So?"},
    ]  # fmt: skip
    await sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.create(model="small", input="x", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"


async def test_nothing_is_kept_of_a_response_that_says_so(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="small", input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)


async def test_a_stream_has_typed_events_in_order(sdk: openai.AsyncOpenAI) -> None:
    events = [e async for e in await sdk.responses.create(model="small", input="Hello", stream=True)]
    assert [e.type for e in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    last = events[-1]
    assert isinstance(last, openai.types.responses.ResponseCompletedEvent)
    assert last.response.output_text == "one two three"
    assert (await sdk.responses.retrieve(last.response.id)).output_text == "one two three"


async def test_a_function_is_called_and_answered(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    chat.engine.chat = saying('{"city": "Oslo"}')
    made = await sdk.responses.create(
        model="small", input="Weather?", tools=[FUNCTION], tool_choice={"type": "function", "name": "weather"}
    )
    [call] = made.output
    assert isinstance(call, openai.types.responses.ResponseFunctionToolCall)
    assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
    chat.engine.reset()
    await sdk.responses.create(
        model="small",
        previous_response_id=made.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "22"}],
    )
    calls = [{"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": call.arguments}}]
    assert chat.engine.generated[-1]["messages"] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "22", "tool_call_id": call.call_id},
    ]


async def test_a_call_is_streamed(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    chat.engine.chat = saying('{"name": "weather", "arguments": {"city": "Oslo"}}')
    stream = await sdk.responses.create(
        model="small", input="Weather?", tools=[FUNCTION], tool_choice="required", stream=True
    )
    events = [e async for e in stream]
    deltas = [e for e in events if isinstance(e, openai.types.responses.ResponseFunctionCallArgumentsDeltaEvent)]
    assert "".join(d.delta for d in deltas) == '{"city": "Oslo"}'
    [done] = [e for e in events if isinstance(e, openai.types.responses.ResponseOutputItemDoneEvent)]
    assert done.item.to_dict()["arguments"] == '{"city": "Oslo"}'


async def test_a_document_and_a_cut(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    chat.engine.chat = saying('{"city": "Oslo"}')
    text: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    made = await sdk.responses.create(model="small", input="Where?", text=text)
    assert made.output_text == '{"city": "Oslo"}'
    assert made.text is not None
    chat.engine.chat = saying('{"ci', "length")
    made = await sdk.responses.create(model="small", input="Where?", text=text)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"


async def test_a_failure_in_mid_stream_is_an_event(chat: Chat, sdk: openai.AsyncOpenAI) -> None:
    chat.engine.chat = failing(chunk("one", 1), EngineError("engine_error"))
    events = [e async for e in await sdk.responses.create(model="small", input="x", stream=True)]
    assert isinstance(events[-1], openai.types.responses.ResponseErrorEvent)
    assert events[-1].code == "engine_error"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "unsupported_parameter",
            "input[0].content[0].type",
        ),
        ({"input": "x", "background": True}, "unsupported_parameter", "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ],
    ids=str,
)
async def test_a_bad_field_is_named(chat: Chat, body: dict[str, Any], code: str, param: str) -> None:
    async with chat.client() as client:
        refused = await client.post("/v1/responses", json={"model": "small", **body})
    assert (refused.status_code, refused.json()["error"]["code"], refused.json()["error"]["param"]) == (
        400,
        code,
        param,
    )


async def test_the_short_way_says_what_it_cost_and_what_is_left(chat: Chat) -> None:
    chat.ledger.available_nano = 5_000_000_000
    async with chat.client(org_id="messages") as client:
        answer = (await client.post("/chat/message", json={"message": "Hello", "max_length": 20})).json()
    assert answer.pop("interaction_id").startswith("msg_")
    assert answer.pop("processing_time_ms") >= 0
    assert answer == {
        "success": True,
        "message": "one two three",
        "model_used": "small",
        "credits_charged": "0.00000001",
        "remaining_credits": "5.00",
    }
    assert chat.engine.generated[0]["max_tokens"] == 20


async def test_the_short_way_refuses_in_problem_json(chat: Chat) -> None:
    chat.ledger.refusal = PaymentRequired()
    async with chat.client(org_id="poor") as client:
        refused = await client.post("/chat/message", json={"message": "Hello"})
        assert (refused.status_code, refused.json()["code"]) == (402, "insufficient_quota")
        assert refused.headers["content-type"] == "application/problem+json"
        refused = await client.post("/chat/message", json={"message": "x" * 2_001})
        assert (refused.status_code, refused.json()["param"]) == (400, "message")
    async with chat.client(models=()) as client:
        assert (await client.post("/chat/message", json={"message": "Hello"})).status_code == 404
