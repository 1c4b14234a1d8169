"""Prompt caches: each conversation finds its own, nobody finds another tenant's."""

from typing import Any

from services.inference.backend.slots import SlotTable, fingerprint
from tests.inference.client import BackendClient, chat


def conversation(*texts: str) -> tuple[int, ...]:
    return fingerprint({"messages": [{"role": "user", "content": text} for text in texts]})


def test_those_at_work_are_neighbours() -> None:
    """The engine computes them in one pass; also where others that are free hold nothing, or longer."""
    table = SlotTable(8)
    first = [table.claim("a", conversation(str(n))) for n in range(4)]
    assert_side_by_side([lease.slot for lease in first])
    for lease in first[1:]:
        table.give_back(lease)
    again = [table.claim("b", conversation(str(n))) for n in range(3)]
    assert_side_by_side([first[0].slot, *(lease.slot for lease in again)])
    assert not any(lease.may_reuse for lease in again)


def assert_side_by_side(slots: list[int]) -> None:
    assert sorted(slots) == list(range(min(slots), min(slots) + len(slots)))


def test_a_conversation_comes_back_to_its_slot() -> None:
    table = SlotTable(3)
    earlier = {text: table.claim("a", conversation(text)) for text in ("one", "two")}
    for lease in earlier.values():
        table.give_back(lease)
    for text in ("two", "one"):
        assert table.claim("a", conversation(text, "more")) == (earlier[text].slot, True)


def test_another_question_about_a_long_document_finds_it() -> None:
    table = SlotTable(3)
    document = "a document, " * 100
    table.give_back(table.claim("a", conversation("something else")))
    held = table.claim("a", conversation(document + "What is it about?"))
    table.give_back(held)
    assert table.claim("a", conversation(document + "Who wrote it?")) == (held.slot, True)


def test_another_tenant_gets_an_empty_slot_first_then_the_oldest_and_reuses_neither() -> None:
    table = SlotTable(2)
    of_a = table.claim("a", conversation("same"))
    table.give_back(of_a)
    of_b = table.claim("b", conversation("same"))
    assert of_b.slot != of_a.slot
    assert not of_b.may_reuse
    table.give_back(of_b)
    of_c = table.claim("c", conversation("same"))
    assert of_c == (of_a.slot, False)
    assert table.claim("b", conversation("same")) == (of_b.slot, True)


def test_a_slot_is_leased_once() -> None:
    table = SlotTable(4)
    assert {table.claim("a", ()).slot for _ in range(4)} == {0, 1, 2, 3}


async def test_a_tenant_neither_sees_nor_gains_by_what_another_has_asked(backend: BackendClient) -> None:
    body = chat("a secret that is long enough to be cached " * 10, tokens=2)

    async def cached(tenant: str) -> int:
        last: dict[str, Any] = (await backend.send("narrow", body, tenant=tenant).all())[-1]
        return int(last["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert await cached("alice") == 0
    assert await cached("mallory") == 0
    assert await cached("mallory") > 50
