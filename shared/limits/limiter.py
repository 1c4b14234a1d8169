"""The limiter in Redis: one script a request, exact over any number of processes.

A refusal by a window is remembered for as long as that window is certain to refuse, at most `refusals_s`: the log is
exact, so nobody who asks again until then could be admitted, and a key far over its limit costs Redis nothing. It
counts only for the very limits (and version of the key) that were refused, and for the connection that it came over:
another server, or the same one after a restart, may not know what this one did.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from shared.limits.link import Argument, Link
from shared.limits.policy import Decision, Lease, Subject, Verdict, WindowState
from shared.limits.scripts import Script

HERE = Path(__file__).parent
ADMIT = HERE / "admit.lua"
RENEW = HERE / "renew.lua"
MICROSECONDS = 1_000_000
REFUSALS_MAX = 10_000
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


class Question(NamedTuple):
    """What Redis was asked; `call` ends with its answer."""

    subject: Subject
    weight: int
    lease_id: str
    sent_s: float
    prepared: tuple[Argument, ...]
    call: asyncio.Future[Any]

    @property
    def lease_names(self) -> tuple[str, ...]:
        return self.subject.lease_names if self.weight else ()


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
        return await self.answer(self.ask(subject, weight))

    def ask(self, subject: Subject, weight: int) -> Question:
        """Ask Redis, without waiting: then `decided`, `answer` or `leave`. Raises RedisUnavailable."""
        has_lease = weight and subject.lease_names
        lease_id = f"{self._lease_prefix}-{next(self._lease_numbers)}" if has_lease else ""
        prepared = self._admit.prepared(
            subject.names, (weight, lease_id, self._lease_ttl_ms, subject.version, *subject.figures)
        )
        return Question(subject, weight, lease_id, time.monotonic(), prepared, self._admit.start(prepared))

    async def answer(self, question: Question) -> Decision:
        """The decision. Raises RedisUnavailable."""
        try:
            return self._decision(question, await self._admit.finish(question.call, question.prepared))
        except asyncio.CancelledError:
            self._forget(question)
            raise

    def decided(self, question: Question) -> Decision | None:
        """The decision, when `question.call` has ended; None when only `answer` knows what to do."""
        return None if question.call.exception() else self._decision(question, question.call.result())

    def leave(self, question: Question) -> None:
        """Nobody waits for the decision any more."""
        question.call.cancel()
        self._forget(question)

    def _forget(self, question: Question) -> None:
        """Replies are in order: this runs after the script, if that runs at all."""
        for name in question.lease_names:
            self._link.send("ZREM", name, question.lease_id)

    def _decision(self, question: Question, answer: list[Any]) -> Decision:
        """What the script's answer means."""
        subject = question.subject
        if answer[0] == 1:
            lease_names = question.lease_names
            for name in lease_names:
                self._held.setdefault(name, set()).add(question.lease_id)
            lease = Lease(question.lease_id, lease_names) if lease_names else None
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
            self._link.send("ZREM", name, lease.id)

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
