"""Whatever the OpenAPI document allows, and what it forbids: never a fault of ours, always an error in shape."""

import asyncio
import contextlib
import json
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode

from shared.identity import HEADER
from tests.chat.conftest import Chat

SHORT, LONG = 2, 200
# Hypothesis blames a strategy for whoever uses `random` meanwhile: the loop's thread, while the fuzzer runs in its own.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")

# The double's engine always says the same: it cannot obey a format. And it has few places.
EXPECTED = {"output_format_violated", "overloaded", "model_loading"}
PROBLEM = {"type", "title", "status", "detail", "code", "request_id"}


async def fuzz(chat: Chat, examples: int) -> None:
    """Every operation of the document, `examples` times in each mode."""
    async with chat.client(org_id="fuzz", kind="user") as client:
        document = (await client.get("/openapi.json")).json()
        headers = {HEADER: client.headers[HEADER]}
    known = {"openapi": document["openapi"], "info": document["info"]}
    paths = {path: item for path, item in document["paths"].items() if not path.startswith("/healthz")}
    schema = schemathesis.openapi.from_dict({**known, "paths": paths, "components": document.get("components", {})})
    await asyncio.to_thread(_run, schema, chat.url, headers, examples)


def _run(schema: Any, url: str, headers: dict[str, str], examples: int) -> None:
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                check(case.call(base_url=url, headers=headers))

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong with nothing
                attempt()


def check(response: Response) -> None:
    if response.status_code < 400:
        return
    body = json.loads(response.content)
    if "error" in body:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        code = body["error"]["code"]
    else:
        assert set(body) >= PROBLEM
        code = body["code"]
    assert response.status_code < 500 or code in EXPECTED, code


async def test_nothing_that_may_be_sent_breaks_it(chat: Chat) -> None:
    await fuzz(chat, SHORT)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
async def test_nothing_that_may_be_sent_breaks_it_for_long(chat: Chat) -> None:
    await fuzz(chat, LONG)
