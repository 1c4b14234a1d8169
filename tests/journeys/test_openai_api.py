"""What OpenAI's own clients do, through the gateway, with the real engine and the real ledger."""

import json
import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deploy.local.unleash import node_directory, npm
from tests.journeys.people import QUESTION, Prices, User, asking
from tests.running_stack import RunningStack

MESSAGES: Any = list(QUESTION)
UNIT = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "unit", "schema": UNIT, "strict": True}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "temperature", "description": "Of now.", "parameters": UNIT}},
    {"type": "function", "function": {"name": "pressure", "parameters": UNIT}},
]
NODE = Path(__file__).parent / "node"
NODE_TIMEOUT_S = 120
ATTEMPTS_MAX = 10


def spent(user: User) -> Decimal:
    """What the wallet has paid, once nothing is held any more."""
    return sum((Decimal(u["cost"]) for u in user.usage()), Decimal(0))


def test_choices_are_paid_as_the_sum_that_is_reported(user: User, openai_client: openai.OpenAI, prices: Prices) -> None:
    made = openai_client.chat.completions.create(model="chat-mini", messages=MESSAGES, n=3, max_tokens=6, seed=1)
    assert [c.index for c in made.choices] == [0, 1, 2]
    assert made.usage is not None
    cost = prices.cost(made.to_dict()["usage"])  # type: ignore[arg-type]
    assert Decimal(made.to_dict()["tollgate"]["settled"]) == cost == spent(user)  # type: ignore[index]


def test_the_engine_writes_the_document_that_was_asked_for(openai_client: openai.OpenAI) -> None:
    made = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, response_format=FORMAT, max_tokens=200
    )
    assert json.loads(made.choices[0].message.content or "")["unit"] in ("celsius", "kelvin")
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_makes_the_call_that_must_be_made(openai_client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "chat-mini", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200}
    if stream:
        with openai_client.chat.completions.stream(**asked, tool_choice="required") as events:
            choice = events.until_done().get_final_completion().choices[0]
    else:
        choice = openai_client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    function = choice.message.tool_calls[0].function
    assert function.name in ("temperature", "pressure")
    assert json.loads(function.arguments)["unit"] in ("celsius", "kelvin")


def test_log_probabilities_and_biases_reach_the_engine(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "chat-mini", "messages": MESSAGES, "temperature": 0, "max_tokens": 1}
    plain = openai_client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.content
    [token] = plain.choices[0].logprobs.content
    assert len(token.top_logprobs) == 3
    assert token.token == plain.choices[0].message.content
    biased = {str(number): -100 for number in range(300)}
    assert openai_client.chat.completions.create(**asked, logit_bias=biased).choices


def test_a_bare_prompt_goes_on(openai_client: openai.OpenAI) -> None:
    made = openai_client.completions.create(model="chat-mini", prompt="Tollgate is a self", max_tokens=3, temperature=0)
    assert made.choices[0].text
    assert made.usage is not None
    assert 1 <= made.usage.completion_tokens <= 3


def test_a_retry_with_an_idempotency_key_is_paid_once(user: User) -> None:
    headers = {"Idempotency-Key": "the-same"}
    answers = [user.api.post("/v1/chat/completions", json=asking(max_tokens=8), headers=headers) for _ in range(3)]
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert [a.headers.get("idempotent-replayed") for a in answers] == [None, "true", "true"]
    assert len(user.usage()) == 1
    other = user.api.post("/v1/chat/completions", json=asking(max_tokens=9), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")


def test_a_cached_answer_is_paid_as_a_cached_prompt(user: User, prices: Prices) -> None:
    body, headers = asking(max_tokens=8, temperature=0), {"tollgate-cache": "use"}
    first = again = user.api.post("/v1/chat/completions", json=body, headers=headers)
    for _ in range(ATTEMPTS_MAX):  # Redis that is late is a miss
        if again.headers["tollgate-cache"] == "hit":
            break
        again = user.api.post("/v1/chat/completions", json=body, headers=headers)
    assert first.json()["choices"] == again.json()["choices"]
    used = again.json()["usage"]
    assert (again.headers["tollgate-cache"], used["completion_tokens"]) == ("hit", 0)
    assert Decimal(again.json()["tollgate"]["settled"]) == prices.of(used["prompt_tokens"], used["prompt_tokens"], 0)


def test_the_count_is_what_the_engine_counts(user: User, prices: Prices) -> None:
    counted = user.api.post("/v1/tokenize", json=asking()).json()
    answered = user.ask(max_tokens=1).json()
    assert counted["count"] == answered["usage"]["prompt_tokens"]
    assert Decimal(counted["cost"]["prompt"]) == prices.of(counted["count"], 0, 0)


def test_completions_are_kept_listed_and_forgotten(openai_client: openai.OpenAI) -> None:
    made = openai_client.chat.completions.create(
        model="chat-mini", messages=MESSAGES, max_tokens=4, store=True, metadata={"topic": "gates"}
    )
    [kept] = openai_client.chat.completions.list(metadata={"topic": "gates"}).data
    assert kept.id == made.id
    assert openai_client.chat.completions.retrieve(made.id).choices[0].message == made.choices[0].message
    [message] = openai_client.chat.completions.messages.list(made.id).data
    assert message.content == QUESTION[0]["content"]
    openai_client.chat.completions.update(made.id, metadata={"topic": "walls"})
    assert openai_client.chat.completions.list(metadata={"topic": "gates"}).data == []
    assert openai_client.chat.completions.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.retrieve(made.id)


def test_responses_go_on_with_a_conversation(openai_client: openai.OpenAI) -> None:
    first = openai_client.responses.create(model="chat-mini", input="What is Tollgate?", max_output_tokens=12)
    with openai_client.responses.stream(
        model="chat-mini", input="What is Tollgate?", previous_response_id=first.id, temperature=0
    ) as events:
        second = events.get_final_response()
    assert second.output_text
    assert openai_client.responses.retrieve(second.id).previous_response_id == first.id


def test_the_short_way_says_what_is_left(user: User) -> None:
    answer = user.api.post("/chat/message", json={"message": "What is Tollgate?", "max_length": 8})
    assert answer.status_code == 200, answer.text
    assert Decimal(answer.json()["remaining_credits"]) == user.wallet().available
    assert Decimal(answer.json()["credits_charged"]) == spent(user)


def test_the_models_say_what_they_can(user: User) -> None:
    model = user.api.get("/v1/models/chat-mini").json()
    assert model["state"] == "ready"
    assert {"tools", "json_schema", "responses"} <= set(model["capabilities"])


@pytest.mark.torture
def test_openais_package_for_node(stack: RunningStack, tmp_path: Path) -> None:
    """Needs the npm registry, as the environments do."""
    for name in (".npmrc", "package.json", "package-lock.json", "client.mjs"):
        shutil.copy(NODE / name, tmp_path / name)
    command, environment = npm(node_directory(), "ci")
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, check=True, timeout=NODE_TIMEOUT_S)
    told = {"TOLLGATE_URL": stack.url, "TOLLGATE_API_KEY": stack.api_key}
    node = str(node_directory() / "bin" / "node")
    ran = subprocess.run(
        [node, "client.mjs"],
        cwd=tmp_path,
        env=told,
        capture_output=True,
        text=True,
        timeout=NODE_TIMEOUT_S,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr


def test_the_document_knows_every_route(stack: RunningStack) -> None:
    paths = httpx.get(f"{stack.url}/openapi.json", timeout=30).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/tokenize", "/chat/message"} <= set(paths)
