"""Sign-in and what follows: sessions, refresh with rotation, logout.

A refresh token is used once. One that comes a second time was copied by somebody, and nobody can tell which of the two
is the thief: the whole session ends, for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.domain import Account, Actor, AuditEntry, Origin, Session, SessionEvent, UserStatus
from services.auth.errors import (
    InvalidCredentials,
    InvalidRefreshToken,
    OrganizationNotFound,
    PasswordQueueFull,
    SessionNotFound,
)
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.sessions import SessionRepository, StoredToken
from services.auth.repository.sign_in import SignInDatabase
from services.auth.service import tokens as refresh_tokens
from services.auth.service.attempts import Attempt, Attempts
from services.auth.service.outbox import Outbox
from services.auth.service.passwords import Passwords, Verdict
from services.auth.service.tokens import Tokens
from shared import ids
from shared.clock import Clock
from shared.database import AsyncSession
from shared.errors import PermissionDenied, TollgateError, Unauthenticated
from shared.identity import Identity
from shared.telemetry import AuthMetrics


@dataclass(frozen=True, slots=True)
class TokenPair:
    """What a client gets; the lifetimes are in seconds. `csrf_token` only for a browser, which keeps cookies."""

    access_token: str
    refresh_token: str
    expires_in_s: int
    refresh_expires_in_s: int
    csrf_token: str = ""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    refresh_ttl_s: int
    session_ttl_s: int
    per_user_max: int
    prune_batch_max: int


class Sessions:
    """Sign-ins have connections of their own (`sign_ins`), so that a flood of them leaves the others' alone."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        sign_ins: SignInDatabase,
        passwords: Passwords,
        attempts: Attempts,
        tokens: Tokens,
        clock: Clock,
        outbox: Outbox,
        metrics: AuthMetrics,
        limits: SessionLimits,
    ) -> None:
        self._sessions = sessions
        self._sign_ins = sign_ins
        self._passwords = passwords
        self._attempts = attempts
        self._tokens = tokens
        self._clock = clock
        self._outbox = outbox
        self._metrics = metrics
        self._limits = limits

    async def login(self, *, login: str, password: str, origin: Origin, browser: bool = False) -> TokenPair:
        """Sign in by user name or e-mail address; `browser`: to keep the tokens in cookies.

        Raises InvalidCredentials, the same after the same work for an unknown user, a wrong password and a disabled
        account; SignInBlocked; PasswordQueueFull.
        """
        try:
            with self._passwords.sign_in():
                async with self._attempts.of(login, origin.address) as attempt:
                    account, new_hash = await self._login(login, password, origin, attempt)
                pair = await self._open(account, new_hash, origin, browser)
        except TollgateError as e:
            self._metrics.logins.labels(e.code).inc()
            raise
        self._metrics.logins.labels("ok").inc()
        return pair

    async def open_external(self, account: Account, origin: Origin, *, browser: bool) -> TokenPair:
        """A session for somebody whom another party vouches for. Raises InvalidCredentials when disabled meanwhile."""
        pair = await self._open(account, None, origin, browser)
        self._metrics.logins.labels("ok").inc()
        return pair

    async def _login(self, login: str, password: str, origin: Origin, attempt: Attempt) -> tuple[Account, str | None]:
        """The account whose password it is, and its new hash where the old one is outdated."""
        account = await self._sign_ins.find(login)
        try:
            verdict = await self._passwords.verify(account.password_hash if account else None, password)
            if account is None or not verdict.correct or account.status is not UserStatus.ACTIVE:
                await self._record_failure(account, verdict, origin, attempt)
                raise InvalidCredentials()
            new_hash = await self._passwords.hash(password) if verdict.outdated else None
        except PasswordQueueFull:
            attempt.withdraw()
            raise
        attempt.succeeded()
        return account, new_hash

    async def _open(self, account: Account, new_hash: str | None, origin: Origin, browser: bool) -> TokenPair:
        now = self._clock.now()
        opened = Session(
            id=ids.uuid7(),
            user_id=account.user_id,
            org_id=account.org_id,
            created_at=now,
            last_used_at=now,
            expires_at=now + timedelta(seconds=self._limits.session_ttl_s),
            revoked_at=None,
            user_agent=origin.user_agent,
            address=origin.address,
            browser=browser,
        )
        pair, digest, expires_at = self._pair(account, opened, now)
        others = await self._sign_ins.open(account, new_hash, opened, digest, expires_at)
        if others is None:
            raise InvalidCredentials(detail="password or status changed meanwhile")
        if others >= self._limits.per_user_max:
            await self._end_crowded_out(account.user_id, now)
        return pair

    async def _end_crowded_out(self, user_id: UUID, now: datetime) -> None:
        async with self._sessions.begin() as session:
            repository = SessionRepository(session)
            live = await repository.live(user_id, now)
            crowded_out = [old.id for old in live[self._limits.per_user_max :]]
            events = await repository.revoke(crowded_out, now, "too_many_sessions")
        await self._outbox.deliver(events)

    async def refresh(self, refresh_token: str, csrf_token: str = "", org_id: UUID | None = None) -> TokenPair:
        """New tokens for a refresh token, which is used up; with `org_id`, for that organisation of theirs from now on.

        Raises InvalidRefreshToken for every reason alike; CsrfFailed for a browser's without its `csrf_token`, and
        OrganizationNotFound for one they do not belong to, before anything is used up.
        """
        now = self._clock.now()
        digest = refresh_tokens.digest(refresh_token)
        events: Sequence[SessionEvent] = ()
        pair: TokenPair | None = None
        async with self._sessions.begin() as session:
            repository = SessionRepository(session)
            stored = await repository.lock_token(digest)
            if stored is not None and stored.session.browser:
                self._tokens.check_csrf(stored.session, csrf_token)
            if stored is not None and stored.used_at is not None:
                events = await self._end_stolen(session, stored, now)
            elif stored is not None and stored.expires_at > now and _is_live(stored.session, now):
                pair, events = await self._renew(session, stored.session, digest, org_id, now)
        # Raised after the transaction, so that a stolen session's end is committed.
        await self._outbox.deliver(events)
        if pair is None:
            raise InvalidRefreshToken()
        return pair

    async def _renew(
        self, session: AsyncSession, signed_in: Session, digest: str, org_id: UUID | None, now: datetime
    ) -> tuple[TokenPair | None, Sequence[SessionEvent]]:
        """New tokens; None for who may have none any more. Those of the organisation that a session leaves are over."""
        repository = SessionRepository(session)
        account = await AccountRepository(session).find(signed_in.user_id, org_id or signed_in.org_id)
        if account is None and org_id is not None:
            raise OrganizationNotFound(param="organization_id")
        if account is None or account.status is not UserStatus.ACTIVE:
            return None, ()
        events: Sequence[SessionEvent] = ()
        if account.org_id != signed_in.org_id:
            events = await repository.leave_organization(signed_in.id, now)
            await repository.enter_organization(signed_in.id, account.org_id)
            signed_in = replace(signed_in, org_id=account.org_id, version=signed_in.version + 1)
        await repository.use_token(digest, signed_in.id, now)
        return await self._issue(repository, account, signed_in, now), events

    async def logout(self, identity: Identity, refresh_token: str | None) -> None:
        """End the session of an access token, or that of a refresh token, or both. Ending an ended one is fine.

        Raises Unauthenticated when there is neither.
        """
        ending = [UUID(identity.session_id)] if identity.session_id else []
        if not ending and refresh_token is None:
            raise Unauthenticated("Send an access token, or refresh_token in the body.", code="no_session")
        async with self._sessions.begin() as session:
            repository = SessionRepository(session)
            if refresh_token is not None:
                stored = await repository.lock_token(refresh_tokens.digest(refresh_token))
                ending += [stored.session.id] if stored else []
            events = await repository.revoke(ending, self._clock.now(), "logout")
        await self._outbox.deliver(events)

    async def list(self, actor: Actor) -> list[Session]:
        """The person's live sessions, newest first. Raises PermissionDenied for an API key."""
        require_person(actor)
        async with self._sessions() as session:
            return await SessionRepository(session).live(actor.user_id, self._clock.now())

    async def revoke(self, actor: Actor, session_id: UUID) -> None:
        """End one of the person's own sessions. Raises SessionNotFound for others', PermissionDenied for a key."""
        require_person(actor)
        async with self._sessions.begin() as session:
            repository = SessionRepository(session)
            if await repository.find(session_id, actor.user_id) is None:
                raise SessionNotFound()
            events = await repository.revoke([session_id], self._clock.now(), "revoked")
        await self._outbox.deliver(events)

    async def prune(self) -> bool:
        """Delete one batch of sessions that are over; whether there may be more."""
        batch_max = self._limits.prune_batch_max
        async with self._sessions.begin() as session:
            return await SessionRepository(session).prune(self._clock.now(), batch_max) == batch_max

    async def _issue(
        self, repository: SessionRepository, account: Account, session: Session, now: datetime
    ) -> TokenPair:
        pair, digest, expires_at = self._pair(account, session, now)
        await repository.add_token(session.id, digest, now=now, expires_at=expires_at)
        return pair

    def _pair(self, account: Account, session: Session, now: datetime) -> tuple[TokenPair, str, datetime]:
        """New tokens, with the refresh token's digest and end, under which it must be stored."""
        refresh_token = refresh_tokens.new_refresh_token()
        expires_at = min(now + timedelta(seconds=self._limits.refresh_ttl_s), session.expires_at)
        pair = TokenPair(
            access_token=self._tokens.access(account, session),
            refresh_token=refresh_token,
            expires_in_s=self._tokens.access_ttl_s,
            refresh_expires_in_s=int((expires_at - now).total_seconds()),
            csrf_token=self._tokens.csrf_token(session) if session.browser else "",
        )
        return pair, refresh_tokens.digest(refresh_token), expires_at

    async def _end_stolen(self, session: AsyncSession, stored: StoredToken, now: datetime) -> Sequence[SessionEvent]:
        if stored.session.revoked_at is not None:
            return []
        owner = stored.session
        events = await SessionRepository(session).revoke([owner.id], now, "refresh_token_reused")
        entry = AuditEntry(
            "session.refresh_token_reused", "session", owner.id, owner.user_id, None, owner.org_id, Origin(), {}
        )
        await audit.append(session, entry, now)
        return events

    async def _record_failure(
        self, account: Account | None, verdict: Verdict, origin: Origin, attempt: Attempt
    ) -> None:
        """What was typed as a name stays out: people type passwords there."""
        reason = "unknown_user" if account is None else "disabled" if verdict.correct else "wrong_password"
        entry = AuditEntry(
            action="sign_in.failed",
            target_type="user",
            target_id=account.user_id if account else None,
            actor_user_id=None,
            actor_key_id=None,
            org_id=account.org_id if account else None,
            origin=origin,
            details={"reason": reason, **({"blocked_s": attempt.blocked_s} if attempt.blocked_s else {})},
        )
        await self._sign_ins.record(entry, self._clock.now())


def _is_live(session: Session, now: datetime) -> bool:
    return session.revoked_at is None and session.expires_at > now


def require_person(actor: Actor) -> None:
    """Raise PermissionDenied for an API key."""
    if actor.identity.kind != "user":
        raise PermissionDenied("This belongs to a person: use an access token.", code="not_a_person")
