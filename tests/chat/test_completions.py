"""OpenAI's shapes on the wire, and what is asked of engine and ledger for them."""

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from shared.errors import PaymentRequired, Unavailable
from shared.identity import HEADER
from tests.chat.conftest import LONG, Chat, asking, until


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    assert all(b.startswith("data: ") for b in blocks)
    return [json.loads(b.removeprefix("data: ")) for b in blocks]


async def test_a_completion_has_openais_shape_and_a_receipt(chat: Chat) -> None:
    answer = await chat.complete(max_tokens=10)
    body = answer.json()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    hold_id = body["tollgate"].pop("hold_id")
    assert body == {
        "object": "chat.completion",
        "model": "small",
        "system_fingerprint": "small-a",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "one two three", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "tollgate": {
            "held": "0.000000024",
            "settled": "0.00000001",
            "tokens": {"input": 7, "cached_input": 2, "output": 3},
            "build": "small-a",
        },
    }
    [settled] = chat.ledger.settled
    assert (settled.hold_id, settled.build, settled.finish_reason) == (hold_id, "small-a", "stop")
    assert settled.usage.output_tokens == 3


async def test_a_stream_begins_with_the_role_and_ends_with_reason_receipt_and_done(chat: Chat) -> None:
    answer = await chat.complete(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    chunks = events(answer.text)
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"], c["object"]) for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)
    choices = [c["choices"][0] for c in chunks]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two"},
        {"content": " three"},
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None] * 4 + ["stop"]
    assert chunks[-1]["tollgate"]["settled"] == "0.00000001"
    assert all("tollgate" not in c for c in chunks[:-1])


async def test_include_usage_adds_a_last_chunk_without_choices(chat: Chat) -> None:
    chunks = events((await chat.complete(stream=True, stream_options={"include_usage": True})).text)
    assert [c["usage"] for c in chunks[:-1]] == [None] * 5
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 10
    assert chunks[-1]["tollgate"]["build"] == "small-a"


async def test_the_engine_gets_what_was_asked_and_who_asked(chat: Chat) -> None:
    await chat.complete(max_completion_tokens=10, temperature=0.5, top_p=0.9, stop="x", seed=3, frequency_penalty=1)
    [generated] = chat.engine.requests
    messages = [{"role": "user", "content": "Count."}]
    assert generated == {
        "model": "small",
        "messages": messages,
        "max_tokens": 10,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 3,
        "frequency_penalty": 1.0,
    }
    assert chat.engine.parameters[0] == {"tg_tenant": "org", "tg_priority": 2, "timeout": 300_000_000}


async def test_a_prompt_whose_bytes_may_not_fit_is_counted_before_its_hold(chat: Chat) -> None:
    await chat.complete(messages=LONG, max_tokens=50)
    counted, _ = chat.engine.requests
    assert counted == {"op": "count", "messages": LONG}
    assert chat.ledger.holds[0].worst_case.input_tokens == 7


async def test_the_hold_covers_prompt_and_asked_tokens_and_names_the_payer(chat: Chat) -> None:
    await chat.complete(max_tokens=10)
    [hold] = chat.ledger.holds
    assert (hold.org_id, hold.user_id, hold.key_id, hold.plan) == ("org", "user", "key", "default")
    assert (hold.model, hold.clamp) == ("small", False)
    assert (hold.worst_case.input_tokens, hold.worst_case.output_tokens) == (14, 10)


async def test_without_a_limit_of_its_own_a_request_gets_what_the_wallet_covers(chat: Chat) -> None:
    chat.ledger.covered = 5
    await chat.complete()
    [hold] = chat.ledger.holds
    assert (hold.worst_case.input_tokens, hold.worst_case.output_tokens, hold.clamp) == (7, 40, True)
    assert (chat.engine.generated[0]["max_tokens"], chat.engine.parameters[-1]["tg_one_by_one"]) == (40, 1)


async def test_what_the_context_cannot_hold_is_refused_without_a_hold(chat: Chat) -> None:
    answer = await chat.complete(max_tokens=94)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert chat.ledger.holds == []
    assert (await chat.complete(max_tokens=93)).status_code == 200


async def test_without_credits_nothing_is_generated(chat: Chat) -> None:
    chat.ledger.refusal = PaymentRequired()
    answer = await chat.complete()
    assert answer.status_code == 402
    assert answer.json()["error"] == {
        "message": PaymentRequired.default_message,
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
    assert [r.get("op") for r in chat.engine.requests] == ["count"]


async def test_billing_away_is_a_503_that_may_be_retried(chat: Chat) -> None:
    chat.ledger.refusal = Unavailable()
    answer = await chat.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "billing_unavailable")
    assert answer.headers["retry-after"] == "1"


async def test_the_answer_is_complete_when_billing_is_away_at_its_end(hasty: Chat) -> None:
    chat = hasty
    chat.ledger.outage = Unavailable()
    body = (await chat.complete()).json()
    assert body["choices"][0]["message"]["content"] == "one two three"
    assert body["tollgate"]["settled"] is None
    chat.ledger.outage = None
    await until(chat.ledger.is_quiet)
    assert chat.ledger.settled[0].hold_id == body["tollgate"]["hold_id"]


async def test_a_model_without_a_ready_build_is_a_503_with_retry_after(chat: Chat) -> None:
    answer = await chat.complete(model="asleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(("model", "models"), [("none", None), ("small", ("other",)), ("small", ())])
async def test_an_unknown_and_a_forbidden_model_look_the_same(
    chat: Chat, model: str, models: tuple[str, ...] | None
) -> None:
    async with chat.client(models=models) as client:
        answers = [
            await client.post("/v1/chat/completions", json=asking(model=model)),
            await client.get(f"/v1/models/{model}"),
        ]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": f"The model `{model}` does not exist or you do not have access to it.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


async def test_scopes_are_required(chat: Chat) -> None:
    async with chat.client(scopes=("models",)) as client:
        refused = await client.post("/v1/chat/completions", json=asking())
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    async with chat.client(scopes=("chat",)) as client:
        assert (await client.get("/v1/models")).status_code == 403
    async with chat.client(kind="anonymous") as client:
        assert (await client.get("/v1/models")).status_code == 401


async def test_nobody_gets_in_without_the_gateways_signature(chat: Chat) -> None:
    async with chat.client() as client:
        for token in ("", "v1.k1.e30.AAAA", client.headers[HEADER] + "x"):
            answer = await client.post("/v1/chat/completions", json=asking(), headers={HEADER: token})
            assert answer.status_code == 401
    assert chat.engine.requests == []


async def test_models_have_openais_shape_with_context_builds_and_prices(chat: Chat) -> None:
    async with chat.client(models=("small",)) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/small")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["owned_by"], one["created"]) == ("small", "model", "tollgate", 1)
    assert one["context_window"] == 90
    assert [(b["name"], b["state"], b["stable"]) for b in one["builds"]] == [
        ("small-a", "ready", True),
        ("small-b", "ready", False),
    ]
    assert one["prices"] == {
        "per_request": "0.00",
        "input": "1.50",
        "cached_input": "0.50",
        "output": "2.00",
    }


async def test_models_are_listed_while_billing_is_away(chat: Chat) -> None:
    chat.ledger.prices_outage = Unavailable()
    async with chat.client() as client:
        listed = (await client.get("/v1/models")).json()["data"]
    assert [(m["id"], m["prices"]) for m in listed] == [("asleep", None), ("small", None)]


async def test_the_openapi_document_describes_the_body_with_examples(chat: Chat) -> None:
    async with chat.client() as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert {"model", "messages"} == set(content["schema"]["required"])
    assert "$ref" not in json.dumps(content)
    for example in content["examples"].values():
        assert (await chat.complete(**{**example["value"], "model": "small"})).status_code == 200
    assert {"200", "400", "401", "402", "403", "404", "429", "503"} <= set(operation["responses"])
    assert "HTTPValidationError" not in json.dumps(operation)


@pytest.mark.parametrize(("flags", "is_joined"), [("01", True), ("00", False)])
async def test_a_sampled_trace_reaches_the_engine_and_only_a_sampled_one(
    chat: Chat, flags: str, is_joined: bool
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with chat.client() as client:
        headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-{flags}"}
        await client.post("/v1/chat/completions", json=asking(), headers=headers)
    joined = [m["traceparent"].split("-")[1] for m in chat.engine.metadata if "traceparent" in m]
    assert joined == ([trace_id] if is_joined else [])


async def test_prompts_and_answers_are_never_logged(chat: Chat) -> None:
    marker = "the-secret-of-the-prompt"
    with capture_logs() as logs:
        await chat.complete(messages=[{"role": "user", "content": marker}])
        await chat.complete(messages=[{"role": marker, "content": marker}])
        await chat.complete(model="asleep", messages=[{"role": "user", "content": marker}])
    assert "completion" in {entry["event"] for entry in logs}
    assert marker not in str(logs)
    assert "one two three" not in str(logs)
