"""What the backend's queue guarantees. Pure Python; time comes from the test."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.backend.queue import FairQueue, QueueClosed, QueueFull

JOIN_TIMEOUT_S = 60


class Now:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class Item:
    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return True  # items count by identity, whatever they say

    __hash__ = object.__hash__


def queue_of(
    capacity: int = 100, tenant_capacity: int = 100, clock: Now | None = None, tenant_hands: int = 100
) -> FairQueue[Item]:
    return FairQueue(capacity, tenant_capacity, tenant_hands, clock or Now())


def put(queue: FairQueue[Item], name: str, priority: int = 2, tenant: str = "a", deadline: float | None = None) -> Item:
    item = Item(name)
    queue.put(item, priority=priority, tenant=tenant, deadline=deadline)
    return item


def names(queue: FairQueue[Item]) -> list[str]:
    found = []
    while len(queue):
        item = queue.get()
        assert item is not None
        found.append(item.name)
    return found


def test_one_tenant_is_served_first_come_first_served() -> None:
    queue = queue_of()
    for name in "abc":
        put(queue, name)
    assert names(queue) == ["a", "b", "c"]


def test_a_smaller_priority_goes_first() -> None:
    queue = queue_of()
    put(queue, "late", priority=9)
    put(queue, "normal")
    put(queue, "urgent", priority=0)
    assert names(queue) == ["urgent", "normal", "late"]


def test_tenants_take_turns_inside_a_priority() -> None:
    queue = queue_of()
    for number in range(4):
        put(queue, f"a{number}", tenant="a")
    put(queue, "b0", tenant="b")
    put(queue, "c0", tenant="c")
    put(queue, "c1", tenant="c")
    assert names(queue) == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]


def test_a_newcomer_waits_for_one_request_of_a_busy_tenant_at_most() -> None:
    queue = queue_of()
    for number in range(50):
        put(queue, f"a{number}", tenant="a")
    first = queue.get()
    put(queue, "b0", tenant="b")
    assert first is not None
    order = names(queue)
    assert order.index("b0") <= 1


def test_whoever_has_fewest_in_hand_is_next() -> None:
    queue = queue_of()
    for number in range(3):
        put(queue, f"a{number}", tenant="a")
    assert [queue.get().name for _ in range(2)] == ["a0", "a1"]  # type: ignore[union-attr]
    put(queue, "b0", tenant="b")
    put(queue, "b1", tenant="b")
    assert names(queue) == ["b0", "b1", "a2"]


def test_no_tenant_has_every_hand() -> None:
    queue = queue_of(tenant_hands=2)
    for number in range(3):
        put(queue, f"a{number}", tenant="a")
    assert [queue.get().name for _ in range(2)] == ["a0", "a1"]  # type: ignore[union-attr]
    put(queue, "b0", tenant="b")
    assert queue.get().name == "b0"  # type: ignore[union-attr]
    got: list[Item | None] = []
    third = threading.Thread(target=lambda: got.append(queue.get()))
    third.start()
    queue.done("b")
    assert not got
    queue.done("a")
    third.join(JOIN_TIMEOUT_S)
    assert [item.name for item in got if item] == ["a2"]


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue = queue_of(capacity=2, tenant_capacity=2)
    put(queue, "1")
    put(queue, "2", tenant="b")
    with pytest.raises(QueueFull):
        put(queue, "3", tenant="c")
    assert names(queue) == ["1", "2"]


def test_no_tenant_takes_more_than_its_share() -> None:
    queue = queue_of(capacity=4, tenant_capacity=2)
    put(queue, "a0", tenant="a")
    put(queue, "a1", tenant="a", priority=0)
    with pytest.raises(QueueFull):
        put(queue, "a2", tenant="a")
    put(queue, "b0", tenant="b")
    assert names(queue) == ["a1", "b0", "a0"]


def test_a_taken_place_is_free_again() -> None:
    queue = queue_of(capacity=1, tenant_capacity=1)
    for number in range(5):
        put(queue, str(number))
        assert names(queue) == [str(number)]


def test_an_expired_item_is_not_handed_out_and_comes_from_expire_once() -> None:
    clock = Now()
    queue = queue_of(clock=clock)
    late = put(queue, "late", deadline=101)
    put(queue, "patient", deadline=200)
    clock.s = 101
    patient = queue.get()
    assert patient is not None
    assert patient.name == "patient"
    assert len(queue) == 1
    assert [item is late for item in queue.expire()] == [True]
    assert queue.expire() == []
    assert len(queue) == 0


def test_expire_leaves_what_has_time() -> None:
    clock = Now()
    queue = queue_of(clock=clock)
    put(queue, "b", deadline=110)
    put(queue, "a", deadline=105)
    put(queue, "never")
    assert queue.expire() == []
    clock.s = 105
    assert [item.name for item in queue.expire()] == ["a"]
    clock.s = 1000
    assert [item.name for item in queue.expire()] == ["b"]
    assert names(queue) == ["never"]


def test_a_removed_item_is_gone_and_others_stay() -> None:
    queue = queue_of()
    put(queue, "1")
    second = put(queue, "2")
    put(queue, "3")
    assert queue.remove(second)
    assert not queue.remove(second)
    assert names(queue) == ["1", "3"]


def test_an_item_that_was_handed_out_cannot_be_removed() -> None:
    queue = queue_of()
    item = put(queue, "1")
    assert queue.get() is item
    assert not queue.remove(item)


def test_get_waits_for_put() -> None:
    queue = queue_of()
    got: list[Item | None] = []
    thread = threading.Thread(target=lambda: got.append(queue.get()))
    thread.start()
    item = put(queue, "1")
    thread.join(JOIN_TIMEOUT_S)
    assert got[0] is item


def test_close_wakes_every_get_and_hands_back_what_waited() -> None:
    queue = queue_of()
    got: list[Item | None] = []
    threads = [threading.Thread(target=lambda: got.append(queue.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue.close()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
    assert got == [None, None, None]
    with pytest.raises(QueueClosed):
        put(queue, "1")

    queue = queue_of()
    put(queue, "1")
    assert [item.name for item in queue.close()] == ["1"]
    assert queue.get() is None


Operation = tuple[str, int, str]
operations = st.lists(
    st.tuples(st.sampled_from(["put", "get", "remove", "tick"]), st.integers(0, 3), st.sampled_from("abc")), max_size=80
)


@given(operations)
def test_nothing_is_lost_or_handed_out_twice(steps: list[Operation]) -> None:
    clock = Now()
    queue = queue_of(capacity=10, tenant_capacity=4, clock=clock)
    waiting: dict[int, Item] = {}
    for action, number, tenant in steps:
        if action == "put":
            try:
                item = put(queue, tenant, number, tenant, deadline=clock.s + 3 if number else None)
            except QueueFull:
                assert len(waiting) == 10 or sum(w.name == tenant for w in waiting.values()) == 4
            else:
                waiting[id(item)] = item
        elif action == "get" and len(queue):
            for late in queue.expire():
                del waiting[id(late)]
            if len(queue):
                got = queue.get()
                assert got is not None
                del waiting[id(got)]
        elif action == "remove" and waiting:
            removed = waiting.pop(list(waiting)[number % len(waiting)])
            assert queue.remove(removed)
        elif action == "tick":
            clock.s += number
        assert len(queue) == len(waiting)
    for late in queue.expire():
        del waiting[id(late)]
    while len(queue):
        got = queue.get()
        assert got is not None
        del waiting[id(got)]
    assert not waiting
