"""Admission: who asks, may they, and within their limits? One Redis round trip for a warm key, and no task.

    credential ─► identity ─► scope ─► limits ─► Admitted
       401           403        429      (also 503 where nobody can tell)

A request that its scope forbids is still looked up in Redis (with weight 0: nothing is drawn), so that a revoked key
gets its 401 before anything else.

A step of it is Admitted; or Asking, to be judged once Redis has answered; or a coroutine's function, for all others:
unknown keys, tokens, nobody at all, and everybody while Redis is away. Who asks is remembered with the head that told
it: a head that comes again, byte for byte, is the same key's for as long as this process knows the key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from services.gateway import cookies
from services.gateway.addresses import owned_by
from services.gateway.cookies import BrowserCookies, Shown
from services.gateway.domain import Ceilings
from services.gateway.heads import RequestHead
from services.gateway.keys import Found, KeyStore
from services.gateway.sessions import SessionStore
from services.gateway.tokens import AccessTokens
from services.gateway.upstreams import Access, Route
from shared import apikeys
from shared.clock import Clock
from shared.errors import PermissionDenied, RateLimited, TollgateError, Unauthenticated, Unavailable
from shared.identity import Identity
from shared.limits import (
    Decision,
    Lease,
    Limits,
    LocalLimiter,
    Question,
    RedisLimiter,
    RedisUnavailable,
    Subject,
    TooManySubjects,
    Verdict,
    admitted_headers,
    rate_limit_headers,
)
from shared.telemetry import GatewayMetrics

CREDENTIAL_CHARS_MAX = 4_096
STALE_ATTEMPTS_MAX = 3
SCHEMES = ("bearer", "apikey")
OWNERS = {"user": "the user", "organization": "the organisation"}


class Admitted(NamedTuple):
    """An admitted request: its caller, the headers of its response, and its place among the concurrent ones."""

    identity: Identity
    headers: bytes
    lease: Lease | None


class Asker(NamedTuple):
    """Who asks with a key, why they may not, and what it draws: nothing when they may not."""

    route: Route
    method: str
    address: str
    found: Found
    identity: Identity
    subject: Subject
    denied: PermissionDenied | None
    weight: int


class Asking(NamedTuple):
    """Redis is being asked: what is to be called with the question then was given to `begin`."""

    asker: Asker
    question: Question


Waiting = Callable[[], Coroutine[Any, Any, Admitted]]
Step = Admitted | Asking | Waiting


class Admission:
    """See the module.

    `weights`: by a route's prefix, what its requests draw instead of 1. `live_gateways` is kept by the heartbeat: how
    many shared the limits when Redis last answered; until it first does, `gateways` as configured.
    """

    def __init__(
        self,
        *,
        keys: KeyStore,
        tokens: AccessTokens,
        sessions: SessionStore,
        browser_cookies: BrowserCookies,
        limiter: RedisLimiter,
        local: LocalLimiter,
        local_addresses: LocalLimiter,
        clock: Clock,
        metrics: GatewayMetrics,
        user_limits: Limits,
        anonymous_limits: Limits,
        ceilings: Ceilings,
        weights: Mapping[str, int],
        gateways: int,
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._sessions = sessions
        self._cookies = browser_cookies
        self._limiter = limiter
        self._local = local
        self._local_addresses = local_addresses  # apart, so that many addresses never crowd out a key
        self._clock = clock
        self._user_limits = user_limits
        self._anonymous_limits = anonymous_limits
        self._ceilings = ceilings
        self._weights = weights
        self._decisions = metrics.admissions
        self._admitted = metrics.admissions.labels("admitted")
        self._duration_s = metrics.limiter_duration_s
        self.live_gateways = gateways

    def begin(
        self, route: Route, method: str, head: RequestHead, address: str, then: Callable[[Question], None]
    ) -> Step:
        """Begin to let a request in; `then` hears of an Asking what is to be judged.

        Every step raises Unauthenticated, PermissionDenied, RateLimited, Unavailable.
        """
        try:
            asker = head.asker
            if asker is None or asker.address != address or not self._keys.still_known(asker.found.record):
                return self._begin(route, method, head, address, then)
            return self._asked(asker, then)
        except TollgateError as e:
            self._decisions.labels(e.code).inc()
            raise

    def judge(self, asking: Asking) -> Step:
        """Redis has answered; where that decides nothing, the coroutine goes on from there."""
        asker, question = asking
        if question.is_admitted and asker.denied is None:
            self._duration_s.observe(time.monotonic() - question.sent_s)
            self._admitted.inc()
            headers = admitted_headers(asker.subject, question.reply)
            return Admitted(asker.identity, headers, self._limiter.admitted(question))
        decision = self._limiter.decided(question)
        if decision is None or decision.verdict is Verdict.STALE:
            return partial(self._counted, partial(self._admit_asker, asker, question))
        self._duration_s.observe(time.monotonic() - question.sent_s)
        try:
            return self._judged(asker.identity, asker.denied, decision)
        except TollgateError as e:
            self._decisions.labels(e.code).inc()
            raise

    def leave(self, asking: Asking) -> None:
        """Nobody waits for what Redis answers."""
        self._limiter.leave(asking.question)

    def shown(self, head: RequestHead) -> Shown:
        """What a request shows: an API key or token in a header, else a browser's token in a cookie."""
        credential = credential_of(head.text(b"authorization"), head.text(b"x-api-key"))
        if credential is not None:
            return Shown(credential)
        return self._cookies.shown(head.text(b"cookie"), head.text(b"x-csrf-token"))

    def release(self, lease: Lease) -> None:
        """Give back the place of a request that has ended."""
        (self._local if lease.local else self._limiter).release(lease)

    def _begin(
        self, route: Route, method: str, head: RequestHead, address: str, then: Callable[[Question], None]
    ) -> Step:
        if route.access is Access.PUBLIC:
            return partial(self._counted, partial(self._admit_anybody, route, address))
        shown = self.shown(head)
        credential = shown.credential
        if not credential:
            raise Unauthenticated()
        if not credential.startswith(apikeys.PREFIX):
            return partial(
                self._counted, partial(self._admit_token, route, method, credential, shown.csrf_token, address)
            )
        if (found := self._keys.known(credential)) is None:
            return partial(self._counted, partial(self._admit_key, route, method, credential, address))
        asker = self._asker(route, method, address, found)
        head.asker = asker if asker.denied is None else None
        return self._asked(asker, then)

    def _asked(self, asker: Asker, then: Callable[[Question], None]) -> Step:
        if (refusal := self._limiter.refused(asker.subject, asker.weight)) is not None:
            return self._judged(asker.identity, asker.denied, refusal)
        try:
            return Asking(asker, self._limiter.ask(asker.subject, asker.weight, then))
        except RedisUnavailable:
            return partial(self._counted, partial(self._admit_asker, asker))

    async def _counted(self, admit: Waiting) -> Admitted:
        try:
            return await admit()
        except TollgateError as e:
            self._decisions.labels(e.code).inc()
            raise

    async def _admit_anybody(self, route: Route, address: str) -> Admitted:
        network = owned_by(address)
        subject = Subject(tag=network, limit_id="anonymous", limits=self._anonymous_limits)
        identity = Identity(kind="anonymous", address=address)
        return self._judged(identity, None, await self._decide(subject, self._weight(route), self._local_addresses))

    async def _admit_token(
        self, route: Route, method: str, token: str, csrf_token: str | None, address: str
    ) -> Admitted:
        if token.count(".") != 2:
            raise Unauthenticated()
        verified = await self._tokens.verify(token, owned_by(address))
        if csrf_token is not None:
            cookies.check(verified, method, csrf_token)
        identity = replace(verified.identity, address=address)
        denied = _denial(route, method, identity)
        subject = Subject(
            tag=identity.org_id,
            limit_id=identity.limit_id,
            limits=self._user_limits,
            version_name=verified.version_name,
            version=str(verified.version),
            ceilings=self._ceilings.subjects(identity.org_id, identity.user_id),
        )
        weight = 0 if denied else self._weight(route)
        for _ in range(STALE_ATTEMPTS_MAX):
            try:
                decision = await self._decide_in_redis(subject, weight)
            except RedisUnavailable:
                await self._sessions.confirm(verified)
                decision = self._decide_locally(self._local, subject, weight)
            if decision.verdict is Verdict.STALE and not await self._sessions.confirm(verified):
                decision = self._decide_locally(self._local, subject, weight)
            if decision.verdict is not Verdict.STALE:
                return self._judged(identity, denied, decision)
        raise Unavailable("Tokens cannot be checked right now. Retry.", retry_after_s=1, detail="version never matched")

    async def _admit_key(self, route: Route, method: str, secret: str, address: str) -> Admitted:
        found = await self._keys.find(secret, owned_by(address))
        return await self._admit_asker(self._asker(route, method, address, found))

    async def _admit_asker(self, asker: Asker, question: Question | None = None) -> Admitted:
        """Admit a key that was found; `question`: what Redis was asked already."""
        for _ in range(STALE_ATTEMPTS_MAX):
            try:
                decision = await self._decide_on_key(asker, question)
            except RedisUnavailable:
                if not asker.found.fresh:  # without Redis only PostgreSQL knows whether the key still stands
                    asker = await self._refreshed(asker)
                decision = self._decide_locally(self._local, asker.subject, asker.weight)
            if decision.verdict is not Verdict.STALE:
                return self._judged(asker.identity, asker.denied, decision)
            asker, question = await self._refreshed(asker), None
        raise Unavailable("Keys cannot be checked right now. Retry.", retry_after_s=1, detail="version never matched")

    async def _refreshed(self, asker: Asker) -> Asker:
        found = await self._keys.refresh(asker.found.record)
        return self._asker(asker.route, asker.method, asker.address, found)

    def _asker(self, route: Route, method: str, address: str, found: Found) -> Asker:
        identity = found.record.identity(address)
        denied = _denial(route, method, identity) if found.record.may_be_used_from(address) else _wrong_address()
        subject = found.record.subject(self._ceilings)
        return Asker(route, method, address, found, identity, subject, denied, 0 if denied else self._weight(route))

    def _weight(self, route: Route) -> int:
        """What a request draws from its limits: as configured for the route, else as its table says."""
        return self._weights.get(route.prefix, route.weight) if self._weights else route.weight

    async def _decide_on_key(self, asker: Asker, question: Question | None) -> Decision:
        """Redis's decision. Raises RedisUnavailable, also when it answers but would not take the key's version."""
        if question is not None:
            return await self._timed(self._limiter.answer(question))
        if not asker.found.filled:
            raise RedisUnavailable("the key's version could not be written")
        return await self._decide_in_redis(asker.subject, asker.weight)

    async def _decide(self, subject: Subject, weight: int, local: LocalLimiter) -> Decision:
        try:
            return await self._decide_in_redis(subject, weight)
        except RedisUnavailable:
            return self._decide_locally(local, subject, weight)

    async def _decide_in_redis(self, subject: Subject, weight: int) -> Decision:
        return await self._timed(self._limiter.admit(subject, weight=weight))

    async def _timed(self, decision: Coroutine[Any, Any, Decision]) -> Decision:
        started = time.perf_counter()
        decided = await decision
        self._duration_s.observe(time.perf_counter() - started)
        return decided

    def _decide_locally(self, local: LocalLimiter, subject: Subject, weight: int) -> Decision:
        try:
            return local.admit(subject, weight=weight, parts=self.live_gateways)
        except TooManySubjects as e:
            raise Unavailable("Limits cannot be checked right now. Retry.", retry_after_s=1) from e

    def _judged(self, identity: Identity, denied: PermissionDenied | None, decision: Decision) -> Admitted:
        headers = rate_limit_headers(decision)
        if denied is not None:
            denied.headers.update(headers)
            raise denied
        if not decision.admitted:
            raise _too_many(decision, headers)
        self._admitted.inc()
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return Admitted(identity, lines.encode(), decision.lease)


def credential_of(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key or token that a client shows: `Bearer x`, `ApiKey x` or a bare `x`, else X-API-Key; None for none."""
    shown = authorization or x_api_key
    if not shown or len(shown) > CREDENTIAL_CHARS_MAX:
        return None
    scheme, _, rest = shown.strip().partition(" ")
    if not rest:
        return scheme or None
    return rest.strip() if scheme.lower() in SCHEMES else None


def _wrong_address() -> PermissionDenied:
    return PermissionDenied("This key may not be used from your address.", code="address_not_allowed")


def _denial(route: Route, method: str, identity: Identity) -> PermissionDenied | None:
    """Why the caller may not use the route, or None."""
    try:
        if route.access is Access.SESSION:
            if identity.kind != "user" and not identity.has_scope("admin"):
                raise PermissionDenied("This needs a signed-in user's access token.", code="access_token_required")
        elif route.access is Access.ADMIN:
            identity.require_scope("admin")
            identity.require_role("operator", "admin")
        else:
            identity.require_scope(route.required_scope(method))
    except PermissionDenied as e:
        return e
    return None


def _too_many(decision: Decision, headers: dict[str, str]) -> RateLimited:
    window = decision.violated
    if window is None:
        whose = OWNERS.get(decision.crowded or "", "this key, user or address")
        return RateLimited(
            f"Too many requests of {whose} run at once. Wait for one to end.",
            code="concurrency_limit_exceeded",
            retry_after_s=decision.retry_after_s,
            headers=headers,
        )
    whose = f" of {OWNERS[window.owner]}" if window.owner else ""
    per = window.name.removeprefix(f"{window.owner}-")
    return RateLimited(
        f"The limit{whose} of {window.quota} requests per {per} is reached. Retry in {decision.retry_after_s} s.",
        retry_after_s=decision.retry_after_s,
        headers=headers,
    )
