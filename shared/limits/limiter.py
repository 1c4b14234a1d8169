"""The limiter in Redis: one script a request, exact over any number of processes.

A refusal by a window is remembered for as long as that window is certain to refuse, at most `refusals_s`: the log is
exact, so nobody who asks again until then could be admitted, and a key far over its limit costs Redis nothing. It
counts only for the very limits (and version of the key) that were refused, and for the connection that it came over:
another server, or the same one after a restart, may not know what this one did.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from shared.limits.link import CommandRefused, Link, RedisUnavailable, Waiting
from shared.limits.policy import Decision, Lease, Subject, Verdict, WindowState
from shared.limits.resp import encoded
from shared.limits.scripts import Script

HERE = Path(__file__).parent
ADMIT = HERE / "admit.lua"
RENEW = HERE / "renew.lua"
MICROSECONDS = 1_000_000
REFUSALS_MAX = 10_000
REMEMBERED_MAX = 10_000
REFUSALS_S = 1.0
RENEWALS_AT_ONCE = 100


class _Refusal(NamedTuple):
    """What Redis refused: certain to be refused again until `until_s`."""

    subject: Subject
    weight: int
    decision: Decision
    epoch: int
    received_s: float
    until_s: float


class Question:
    """What Redis was asked: a Hearer. `then` is called with it once `reply` is there, in the same turn of the loop."""

    __slots__ = ("arguments", "count", "lease_id", "reply", "sent_s", "subject", "then", "weight")

    def __init__(
        self,
        subject: Subject,
        weight: int,
        lease_id: str,
        count: int,
        arguments: bytes,
        then: Callable[[Question], None],
    ) -> None:
        self.subject = subject
        self.weight = weight
        self.lease_id = lease_id
        self.count = count
        self.arguments = arguments
        self.then: Callable[[Question], None] | None = then
        self.sent_s = time.monotonic()
        self.reply: Any = None

    @property
    def is_gone(self) -> bool:
        return self.then is None

    @property
    def is_admitted(self) -> bool:
        return type(self.reply) is list and self.reply[0] == 1

    def hear(self, reply: Any) -> None:
        self.reply = reply
        then, self.then = self.then, None
        if then is not None:
            then(self)


class RedisLimiter:
    """Decides by admit.lua, and keeps the leases of requests that run."""

    def __init__(
        self,
        link: Link,
        *,
        lease_ttl_s: float = 60,
        refusals_max: int = REFUSALS_MAX,
        refusals_s: float = REFUSALS_S,
        admit: Script | None = None,
    ) -> None:
        self._link = link
        self._lease_ttl_ms = int(lease_ttl_s * 1000)
        self._ttl_told = encoded(self._lease_ttl_ms)
        self._refusals_max = refusals_max
        self._refusals_s = refusals_s
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()
        self._admit = admit or Script.read(link, ADMIT)
        self._renew = Script.read(link, RENEW)
        self._lease_prefix = secrets.token_hex(8)
        self._lease_numbers = count()
        self._held: dict[str, set[str]] = {}

    def refused(self, subject: Subject, weight: int) -> Decision | None:
        """The refusal that Redis would give now without being asked, or None."""
        refusal = self._refusals.get(subject.state_name) if self._refusals and weight else None
        if refusal is None:
            return None
        now_s = time.monotonic()
        if now_s >= refusal.until_s or refusal.subject != subject or refusal.epoch != self._link.epoch:
            del self._refusals[subject.state_name]
            return None
        if refusal.weight != weight or not self._link.up:
            return None
        return _aged(refusal.decision, now_s - refusal.received_s)

    async def admit(self, subject: Subject, *, weight: int = 1) -> Decision:
        """Decide and, when admitted, record. Weight 0 only looks. Raises RedisUnavailable: then nobody knows."""
        if (refusal := self.refused(subject, weight)) is not None:
            return refusal
        waiting = Waiting()
        question = self.ask(subject, weight, waiting.hear)
        try:
            await waiting.future
        except asyncio.CancelledError:
            self.leave(question)
            raise
        return await self.answer(question)

    def ask(self, subject: Subject, weight: int, then: Callable[[Question], None]) -> Question:
        """Ask Redis, without waiting: then `decided`, `admitted`, `answer` or `leave`. Raises RedisUnavailable."""
        has_lease = weight and subject.lease_names
        lease_id = f"{self._lease_prefix}-{next(self._lease_numbers)}" if has_lease else ""
        count, names, told = subject.encoded
        arguments = b"%b%b%b%b%b" % (names, _encoded(weight), encoded(lease_id), self._ttl_told, told)
        question = Question(subject, weight, lease_id, count + 3, arguments, then)
        self._link.ask(subject.state_name, self._admit.packed(count + 3, arguments), question)
        return question

    async def answer(self, question: Question) -> Decision:
        """The decision, when there is a reply; asks again where that says that nothing ran. Raises RedisUnavailable."""
        reply = question.reply
        if isinstance(reply, CommandRefused) and reply.is_noscript:
            waiting = Waiting()
            packed = self._admit.packed(question.count, question.arguments, with_text=True)
            self._link.ask(question.subject.state_name, packed, waiting)
            try:
                reply = await waiting.future
            except asyncio.CancelledError:
                self._forget(question)
                raise
        if isinstance(reply, RedisUnavailable):
            raise reply
        return self._decision(question, reply)

    def decided(self, question: Question) -> Decision | None:
        """The decision, when there is a reply; None when only `answer` knows what to do."""
        return None if isinstance(question.reply, RedisUnavailable) else self._decision(question, question.reply)

    def admitted(self, question: Question) -> Lease | None:
        """The place of a question that `is_admitted`."""
        names = question.subject.lease_names if question.weight else ()
        if not names:
            return None
        lease = Lease(question.lease_id, names)
        for name in names:
            if (held := self._held.get(name)) is None:
                held = self._held[name] = set()
            held.add(lease.id)
        return lease

    def leave(self, question: Question) -> None:
        """Nobody waits for the decision any more."""
        question.then = None
        self._forget(question)

    def _forget(self, question: Question) -> None:
        """Replies are in order: this runs after the script, if that runs at all."""
        for name in question.subject.lease_names if question.lease_id else ():
            self._give_back(name, question.lease_id)

    def _give_back(self, name: str, lease_id: str) -> None:
        with contextlib.suppress(RedisUnavailable):
            self._link.ask(name, b"*3\r\n%b%b" % (_zrem(name), encoded(lease_id)), None)

    def _decision(self, question: Question, answer: list[Any]) -> Decision:
        """What the script's answer means."""
        subject = question.subject
        if answer[0] == 1:
            lease = self.admitted(question)
            return Decision(Verdict.ADMITTED, _windows(subject, answer), None, lease, subject.policy)
        if answer[0] == -1:
            return Decision(Verdict.STALE)
        decision = Decision(
            Verdict.REFUSED, _windows(subject, answer), _crowded(subject, answer), policy=subject.policy
        )
        self._remember(subject, question.weight, decision, question.sent_s)
        return decision

    def release(self, lease: Lease) -> None:
        """Give a place back. What does not reach Redis expires there."""
        for name in lease.names:
            held = self._held.get(name)
            if held is None or lease.id not in held:
                continue
            held.discard(lease.id)
            if not held:
                del self._held[name]
            self._give_back(name, lease.id)

    async def renew_leases(self) -> None:
        """Prolong the leases of all requests that run; call it at least twice per TTL. Raises RedisUnavailable."""
        held = list(self._held.items())
        for begin in range(0, len(held), RENEWALS_AT_ONCE):
            batch = [(name, tuple(ids)) for name, ids in held[begin : begin + RENEWALS_AT_ONCE] if ids]
            await asyncio.gather(*[self._renew((name,), (self._lease_ttl_ms, *ids)) for name, ids in batch])

    def _remember(self, subject: Subject, weight: int, decision: Decision, sent_s: float) -> None:
        """The wait counts from the script's own time, which was after `sent_s`."""
        violated = decision.violated
        if violated is None:
            return
        until_s = sent_s + min(violated.wait_s, self._refusals_s)
        self._refusals[subject.state_name] = _Refusal(
            subject, weight, decision, self._link.epoch, time.monotonic(), until_s
        )
        while len(self._refusals) > self._refusals_max:
            self._refusals.popitem(last=False)


@lru_cache(maxsize=1_000)
def _encoded(weight: int) -> bytes:
    return encoded(weight)


@lru_cache(maxsize=REMEMBERED_MAX)
def _zrem(name: str) -> bytes:
    return encoded("ZREM", name)


def _windows(subject: Subject, answer: list[Any]) -> tuple[WindowState, ...]:
    return tuple(
        [
            WindowState(
                name,
                length_s,
                quota,
                answer[at],
                answer[at + 1] / MICROSECONDS,
                answer[at + 2] / MICROSECONDS,
                owner,
            )
            for at, name, length_s, quota, owner in subject.windows
        ]
    )


def _crowded(subject: Subject, answer: list[Any]) -> str | None:
    """Who has too many requests at once: the first of those that a request draws on."""
    for which, drawn in enumerate(subject.drawn):
        if drawn.limits.concurrency and answer[1 + 10 * which] >= drawn.limits.concurrency:
            return drawn.owner
    return None


def _aged(decision: Decision, age_s: float) -> Decision:
    """The same refusal somewhat later: never a wait that is shorter than the truth."""
    windows = tuple(
        [
            w._replace(reset_s=max(w.reset_s - age_s, 0.001), wait_s=max(w.wait_s - age_s, 0.001) if w.wait_s else 0.0)
            for w in decision.windows
        ]
    )
    return Decision(Verdict.REFUSED, windows, decision.crowded, policy=decision.policy)
