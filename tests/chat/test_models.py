"""Models that are loaded when somebody asks for them, and models that do not chat."""

from collections.abc import AsyncIterator

import pytest

from tests.chat.conftest import Chat, until


@pytest.fixture
async def more(chat: Chat) -> AsyncIterator[Chat]:
    """With the models `dozing` and `vectors`."""

    async def has_them(there: bool) -> bool:
        async with chat.client() as client:
            listed = {m["id"] for m in (await client.get("/v1/models")).json()["data"]}
        return ({"dozing", "vectors"} <= listed) == there

    chat.catalogue.has_more = True
    await until(lambda: has_them(True))
    yield chat
    chat.catalogue.has_more = chat.catalogue.is_awake = False
    await until(lambda: has_them(False))


async def test_a_build_on_demand_is_loaded_for_the_first_request(more: Chat) -> None:
    async with more.client() as client:
        assert (await client.get("/v1/models/dozing")).json()["state"] == "unloaded"
    answer = await more.complete(model="dozing", max_tokens=10)
    assert answer.status_code == 200
    assert answer.json()["system_fingerprint"] == "dozing-a"
    async with more.client() as client:
        assert (await client.get("/v1/models/dozing")).json()["state"] == "ready"


async def test_a_model_for_something_else_is_refused_before_it_costs(more: Chat) -> None:
    answer = await more.complete(model="vectors")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_model"
    assert not more.ledger.holds
    assert not more.engine.requests
