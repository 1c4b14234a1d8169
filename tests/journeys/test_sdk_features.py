"""Every field that is served, sent by OpenAI's own package; what is not here is in test_openai_api.py."""

import base64
import json
import struct
from typing import Any

import openai
import pytest

from tests.journeys.people import QUESTION, User

MESSAGES: Any = list(QUESTION)
CALL: Any = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
}
NOW: Any = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
DIMENSIONS = 8
DIFFERENCE_MAX = 1e-6


def text_of(made: Any) -> str:
    return str(made.choices[0].message.content)


def test_sampling_fields_reach_the_engine(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "chat-mini", "messages": MESSAGES, "max_completion_tokens": 16, "seed": 3}
    plain = openai_client.chat.completions.create(**asked, temperature=0)
    word = text_of(plain).split()[1]
    stopped = openai_client.chat.completions.create(**asked, temperature=0, stop=[word])
    assert word not in text_of(stopped)
    assert stopped.choices[0].finish_reason == "stop"
    unlike = openai_client.chat.completions.create(
        **asked, temperature=1.5, top_p=0.9, presence_penalty=2, frequency_penalty=2, user="somebody"
    )
    assert unlike.choices[0].finish_reason in ("stop", "length")


def test_a_cut_answer_says_so_and_a_tier_is_told(openai_client: openai.OpenAI) -> None:
    made = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, max_completion_tokens=2, service_tier="flex"
    )
    assert (made.choices[0].finish_reason, made.service_tier) == ("length", "flex")


def test_any_json_object_is_one(openai_client: openai.OpenAI) -> None:
    made = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=400
    )
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text_of(made)), dict)
    else:
        assert made.choices[0].finish_reason == "length"


def test_developers_and_tools_take_part(openai_client: openai.OpenAI) -> None:
    conversation: Any = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        CALL,
        {"role": "tool", "tool_call_id": "call_1", "content": "Noon."},
    ]
    made = openai_client.chat.completions.create(
        model="chat-mini", messages=conversation, tools=NOW, tool_choice="none", max_tokens=8
    )
    assert made.choices[0].message.tool_calls is None
    named: Any = {"type": "function", "function": {"name": "now"}}
    called = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, tools=NOW, tool_choice=named, parallel_tool_calls=False, max_tokens=200
    )
    assert called.choices[0].message.tool_calls
    assert called.choices[0].message.tool_calls[0].to_dict()["function"]["name"] == "now"  # type: ignore[index]


def test_log_probabilities_come_in_a_stream_too(openai_client: openai.OpenAI) -> None:
    stream = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, stream=True
    )
    told = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    tokens = [token for each in told for token in each.content or ()]
    assert len(tokens) == 3
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_a_retry_by_the_sdk_with_its_idempotency_key_is_the_same_answer(user: User) -> None:
    sdk = user.openai()
    headers = {"Idempotency-Key": "sdk"}
    made = [
        sdk.chat.completions.create(model="chat-mini", messages=MESSAGES, max_tokens=4, extra_headers=headers)
        for _ in range(2)
    ]
    assert made[0] == made[1]
    streamed = [
        "".join(
            c.choices[0].delta.content or ""
            for c in sdk.chat.completions.create(
                model="chat-mini", messages=MESSAGES, max_tokens=4, stream=True, extra_headers={"Idempotency-Key": "s"}
            )
        )
        for _ in range(2)
    ]
    assert streamed[0] == streamed[1]
    assert len(user.usage()) == 2


def test_a_text_completion_streams(openai_client: openai.OpenAI) -> None:
    stream = openai_client.completions.create(
        model="chat-mini", prompt="Tollgate is", max_tokens=4, stream=True, echo=True, logprobs=1
    )
    assert "".join(c.choices[0].text for c in stream if c.choices).startswith("Tollgate is")


def test_responses_come_as_typed_events_and_are_deleted(openai_client: openai.OpenAI) -> None:
    stream = openai_client.responses.create(model="chat-mini", input="What is Tollgate?", stream=True)
    events = list(stream)
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert isinstance(events[-1], openai.types.responses.ResponseCompletedEvent)
    made = events[-1].response
    deltas = (e for e in events if isinstance(e, openai.types.responses.ResponseTextDeltaEvent))
    assert "".join(e.delta for e in deltas) == made.output_text
    openai_client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(made.id)


def test_vectors_are_the_same_in_both_encodings_and_shorter_on_demand(openai_client: openai.OpenAI) -> None:
    texts = ["keys", "limits"]
    asked: dict[str, Any] = {"model": "embed-mini", "input": texts, "dimensions": DIMENSIONS}
    numbers = openai_client.embeddings.create(**asked, encoding_format="float").data
    packed = openai_client.embeddings.create(**asked, encoding_format="base64").data
    for one, other in zip(numbers, packed, strict=True):
        found = struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(other.embedding))  # type: ignore[arg-type]
        assert max(abs(a - b) for a, b in zip(one.embedding, found, strict=True)) < DIFFERENCE_MAX
    whole = openai_client.embeddings.create(model="embed-mini", input=texts[0]).data[0].embedding
    assert len(whole) > DIMENSIONS


def test_what_the_package_does_not_know_is_plain_http(user: User) -> None:
    ranked = user.api.post(
        "/v1/rerank", json={"model": "embed-mini", "query": "credits", "documents": ["limits", "credits"], "top_n": 1}
    )
    assert [r["index"] for r in ranked.json()["results"]] == [1]
    counted = user.api.post("/v1/tokenize", json={"model": "chat-mini", "prompt": "Tollgate"})
    assert counted.json()["count"] >= 1
