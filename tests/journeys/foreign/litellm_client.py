"""litellm's client against a Tollgate: prints "ok" when everything was as its users expect."""

import json
import os
from typing import Any

import litellm  # type: ignore[import-not-found]  # of the environment that runs this

CALL = {"api_base": f"{os.environ['TOLLGATE_URL']}/v1", "api_key": os.environ["TOLLGATE_API_KEY"], "num_retries": 0}
MODEL = "openai/chat-mini"
MESSAGES = [{"role": "user", "content": "What is Tollgate?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "temperature", "parameters": PARAMETERS}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "unit", "schema": PARAMETERS, "strict": True}}


def complete(**options: Any) -> Any:
    return litellm.completion(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 40, **CALL, **options})


def main() -> None:
    litellm.suppress_debug_info = True  # it prints
    whole = complete(n=2, seed=7, stop=["zzz"])
    assert len(whole.choices) == 2
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0

    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert litellm.stream_chunk_builder(chunks, messages=MESSAGES).usage.completion_tokens > 0

    called = complete(tools=TOOLS, tool_choice="required", max_tokens=200).choices[0]
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.message.tool_calls[0].function.arguments)["unit"] in ("celsius", "kelvin")
    deltas = list(complete(tools=TOOLS, tool_choice="required", max_tokens=200, stream=True))
    built = litellm.stream_chunk_builder(deltas, messages=MESSAGES).choices[0].message
    assert json.loads(built.tool_calls[0].function.arguments)["unit"] in ("celsius", "kelvin")

    document = complete(response_format=FORMAT, max_tokens=200).choices[0].message.content
    assert json.loads(document)["unit"] in ("celsius", "kelvin")

    text = litellm.text_completion(model="text-completion-openai/chat-mini", prompt="Tollgate is", max_tokens=4, **CALL)
    assert text.choices[0].text

    vectors = litellm.embedding(  # it knows by the name which models have dimensions
        model="openai/embed-mini", input=["keys", "limits"], dimensions=8, allowed_openai_params=["dimensions"], **CALL
    )
    assert [len(v["embedding"]) for v in vectors.data] == [8, 8]

    for wrong, error in (
        ({"model": "openai/gpt-9"}, litellm.NotFoundError),
        ({"api_key": "tg_live_wrong"}, litellm.AuthenticationError),
        ({"max_tokens": 100_000}, litellm.BadRequestError),
    ):
        try:
            complete(**wrong)
        except error:
            continue
        raise AssertionError(f"{wrong} was not refused")
    print("ok")


main()
