"""langchain-openai against a Tollgate: prints "ok" when everything was as its users expect."""

import os
from typing import Any

import openai
from langchain_core.messages import (  # type: ignore[import-not-found]  # of the environment that runs this
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool  # type: ignore[import-not-found]
from langchain_openai import ChatOpenAI, OpenAIEmbeddings  # type: ignore[import-not-found]
from pydantic import BaseModel

BASE = f"{os.environ['TOLLGATE_URL']}/v1"
KEY = os.environ["TOLLGATE_API_KEY"]
QUESTION = [SystemMessage("Answer."), HumanMessage("What is Tollgate?")]


class Unit(BaseModel):
    """A unit of temperature."""

    is_celsius: bool


@tool  # type: ignore[untyped-decorator]
def temperature(is_celsius: bool) -> str:
    """The temperature of now."""
    return "22" if is_celsius else "295"


def chat(**options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "base_url": BASE,
        "api_key": KEY,
        "model": "chat-mini",
        "max_retries": 0,
        "max_tokens": 40,
    }
    return ChatOpenAI(**{**settings, **options})


def main() -> None:
    whole = chat(seed=7).invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")

    streamed = AIMessageChunk("")
    for chunk in chat(stream_usage=True).stream(QUESTION):
        streamed += chunk
    assert streamed.content
    assert streamed.usage_metadata["output_tokens"] > 0

    tools = chat(max_tokens=200).bind_tools([temperature], tool_choice="required")
    called = tools.invoke(QUESTION)
    [call] = called.tool_calls
    assert call["name"] == "temperature"
    assert isinstance(call["args"]["is_celsius"], bool)
    answer = ToolMessage(temperature.invoke(call["args"]), tool_call_id=call["id"])
    assert chat().invoke([*QUESTION, called, answer]).content is not None
    flowing = AIMessageChunk("")
    for chunk in tools.stream(QUESTION):
        flowing += chunk
    assert isinstance(flowing.tool_calls[0]["args"]["is_celsius"], bool)

    for method in ("json_schema", "function_calling"):
        found = chat(max_tokens=200).with_structured_output(Unit, method=method).invoke(QUESTION)
        assert isinstance(found, Unit), method

    responses = chat(use_responses_api=True).invoke(QUESTION)
    assert responses.text

    vectors = OpenAIEmbeddings(
        base_url=BASE, api_key=KEY, model="embed-mini", dimensions=8, check_embedding_ctx_length=False
    )
    assert [len(v) for v in vectors.embed_documents(["keys", "limits"])] == [8, 8]

    refusals: tuple[tuple[dict[str, Any], type[Exception]], ...] = (
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"api_key": "tg_live_wrong"}, openai.AuthenticationError),
        ({"max_tokens": 100_000}, openai.BadRequestError),
    )
    for wrong, error in refusals:
        try:
            chat(**wrong).invoke(QUESTION)
        except error:
            continue
        raise AssertionError(f"{wrong} was not refused")
    print("ok")


main()
