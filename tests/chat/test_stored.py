"""Kept completions: only what was asked for, only for its organisation, only for as long as it says."""

import json
from typing import Any

import httpx
import pytest

from tests.chat.conftest import Chat, asking
from tests.chat.test_completions import events

PATH = "/v1/chat/completions"


def org(name: str) -> dict[str, Any]:
    return {"org_id": name, "user_id": f"user-of-{name}"}


async def keep(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json=asking(store=True, **body))
    assert answer.status_code == 200, answer.text
    kept: dict[str, Any] = answer.json()
    return kept


async def test_what_is_stored_is_what_was_sent(chat: Chat) -> None:
    async with chat.client(**org("a")) as client:
        sent = await keep(client, metadata={"topic": "x"})
        assert sent["metadata"] == {"topic": "x"}
        assert (await client.get(f"{PATH}/{sent['id']}")).json() == sent
        messages = (await client.get(f"{PATH}/{sent['id']}/messages")).json()["data"]
        assert messages == [{"id": f"{sent['id']}-0", "role": "user", "content": "Count."}]


async def test_a_stream_is_stored_as_a_whole(chat: Chat) -> None:
    async with chat.client(**org("b")) as client:
        answer = await client.post(
            PATH, json=asking(store=True, stream=True, messages=[{"role": "user", "content": "\0"}])
        )
        [first, *_] = events(answer.text)
        kept = (await client.get(f"{PATH}/{first['id']}")).json()
    assert kept["choices"][0]["message"]["content"] == "one two three"
    assert kept["usage"]["completion_tokens"] == 3
    assert kept["system_fingerprint"] == "small-a"


@pytest.mark.parametrize("asked", [{"model": "a\0"}, {"user_id": "\0"}, {"after": "chatcmpl-\0"}])
async def test_what_no_text_can_be_is_bad_input_and_no_outage(chat: Chat, asked: dict[str, str]) -> None:
    async with chat.client(**org("b")) as client:
        answer = await client.get(PATH, params=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


async def test_nothing_is_stored_unasked(chat: Chat) -> None:
    async with chat.client(**org("c")) as client:
        id_ = (await client.post(PATH, json=asking())).json()["id"]
        missing = await client.get(f"{PATH}/{id_}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "completion_not_found")
        assert (await client.get(PATH)).json() == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip


async def test_lists_have_pages_and_filters(chat: Chat) -> None:
    async with chat.client(**org("d")) as client:
        ids = [(await keep(client, metadata={"n": str(i), "odd": str(i % 2)}))["id"] for i in range(5)]
        page = (await client.get(PATH, params={"limit": 2})).json()
        assert ([d["id"] for d in page["data"]], page["has_more"]) == (ids[:2:-1], True)
        page = (await client.get(PATH, params={"limit": 10, "after": page["last_id"]})).json()
        assert ([d["id"] for d in page["data"]], page["has_more"]) == (ids[2::-1], False)
        page = (await client.get(PATH, params={"order": "asc", "metadata[odd]": "1"})).json()
        assert [d["id"] for d in page["data"]] == [ids[1], ids[3]]
        assert (await client.get(PATH, params={"model": "other"})).json()["data"] == []
        for bad in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
            assert (await client.get(PATH, params=bad)).status_code == 400


async def test_metadata_may_change_and_completions_be_forgotten(chat: Chat) -> None:
    async with chat.client(**org("e")) as client:
        id_ = (await keep(client))["id"]
        changed = await client.post(f"{PATH}/{id_}", json={"metadata": {"a": "b"}})
        assert changed.json()["metadata"] == {"a": "b"}
        assert (await client.get(PATH, params={"metadata[a]": "b"})).json()["data"][0]["id"] == id_
        gone = await client.delete(f"{PATH}/{id_}")
        assert gone.json() == {"object": "chat.completion.deleted", "id": id_, "deleted": True}
        for method in ("GET", "DELETE"):
            assert (await client.request(method, f"{PATH}/{id_}")).status_code == 404


async def test_another_organisation_sees_nothing(chat: Chat) -> None:
    async with chat.client(**org("f")) as owner, chat.client(**org("g")) as other:
        id_ = (await keep(owner))["id"]
        assert (await other.get(PATH)).json()["data"] == []
        for answer in (
            await other.get(f"{PATH}/{id_}"),
            await other.get(f"{PATH}/{id_}/messages"),
            await other.post(f"{PATH}/{id_}", json={"metadata": {}}),
            await other.delete(f"{PATH}/{id_}"),
        ):
            assert answer.status_code == 404
        assert (await other.get(f"{PATH}/export")).text == ""
        assert (await owner.get(f"{PATH}/{id_}")).status_code == 200


async def test_the_export_has_everything_and_the_statistics_count_it(chat: Chat) -> None:
    async with chat.client(**org("h")) as client:
        kept = [await keep(client, messages=[{"role": "user", "content": f"No. {i}"}]) for i in range(3)]
        lines = [json.loads(line) for line in (await client.get(f"{PATH}/export")).text.splitlines()]
        assert [line["completion"]["id"] for line in lines] == [k["id"] for k in kept]
        assert lines[1]["messages"] == [{"role": "user", "content": "No. 1"}]
        [row] = (await client.get("/v1/chat/statistics")).json()["data"]
        assert (row["user_id"], row["model"], row["completions"]) == ("user-of-h", "small", 3)
        assert (row["input_tokens"], row["output_tokens"], row["settled"]) == (21, 9, "0.00000003")


async def test_retention_is_the_organisations_and_a_persons_to_change(chat: Chat) -> None:
    async with chat.client(**org("i")) as key, chat.client(**org("i"), kind="user") as person:
        assert (await key.get("/v1/chat/retention")).json() == {"days": 30}
        assert (await key.put("/v1/chat/retention", json={"days": 7})).status_code == 403
        assert (await person.put("/v1/chat/retention", json={"days": 0})).status_code == 400
        assert (await person.put("/v1/chat/retention", json={"days": 7})).json() == {"days": 7}
        assert (await key.get("/v1/chat/retention")).json() == {"days": 7}
    async with chat.client(**org("j")) as other:
        assert (await other.get("/v1/chat/retention")).json() == {"days": 30}


@pytest.mark.parametrize("id_", ["%00", "%FF", "x" * 3_000, "..%2F", "'; DROP TABLE chat.stored; --"])
async def test_an_id_that_is_none_is_not_found(chat: Chat, id_: str) -> None:
    async with chat.client() as client:
        assert (await client.get(f"{PATH}/{id_}")).status_code == 404


async def test_scopes_are_required(chat: Chat) -> None:
    async with chat.client(scopes=("models",)) as client:
        for path in (PATH, f"{PATH}/export", f"{PATH}/x", "/v1/chat/statistics", "/v1/chat/retention"):
            assert (await client.get(path)).status_code == 403
