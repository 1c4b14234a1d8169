"""Auth's composition root: everything is constructed here, in order, and handed down."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import argon2
import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth import tasks
from services.auth.clients import ChangeChannel, Mailer, UsageStream
from services.auth.clients.oidc import OidcClient
from services.auth.errors import SigningKeyUnreadable
from services.auth.repository.sign_in import SignInDatabase
from services.auth.routes import (
    admin,
    jwks,
    keys,
    oidc,
    organizations,
    registration,
    service_accounts,
    sessions,
    storage,
    users,
)
from services.auth.service import Services
from services.auth.service.access import Access
from services.auth.service.accounts import Accounts
from services.auth.service.admin import Admin
from services.auth.service.attempts import AttemptLimits, Attempts
from services.auth.service.bootstrap import Bootstrap
from services.auth.service.email import Email, EmailLimits
from services.auth.service.installation import Installation
from services.auth.service.key_usage import KeyUsage
from services.auth.service.keys import Keys
from services.auth.service.oidc import OidcSignIn
from services.auth.service.organizations import OrganizationLimits, Organizations
from services.auth.service.outbox import Outbox, OutboxLimits
from services.auth.service.passwords import Passwords
from services.auth.service.registration import Registration
from services.auth.service.revocations import Revocations
from services.auth.service.service_accounts import ServiceAccounts
from services.auth.service.sessions import SessionLimits, Sessions
from services.auth.service.signing import RotationLimits, SigningKeys
from services.auth.service.tokens import Tokens
from services.auth.settings import AuthSettings
from shared import cache, database, web
from shared.apikeys import Peppers
from shared.clock import Clock, SystemClock
from shared.database import AsyncSession
from shared.identity import IdentityRing
from shared.runtime import HttpServer, Service
from shared.telemetry import AuthMetrics, new_registry
from shared.web import Readiness

CLOCK_SKEW_S = 60  # between replicas and whoever verifies tokens
DESCRIPTION = "Accounts, sessions, organisations and API keys."


async def build(settings: AuthSettings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    """The service for the runtime."""
    clock = SystemClock()
    registry = new_registry()
    try:
        services = await compose(settings, stack, readiness, clock=clock, registry=registry)
    except SigningKeyUnreadable as e:
        raise SystemExit(f"auth: {e.message}") from None
    app = create_app(settings, services, readiness, clock, registry)
    return Service(http=[HttpServer(app, settings.auth_http_listen)], tasks=_background(settings, services))


def _background(settings: AuthSettings, services: Services) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
    prunes: dict[str, Callable[[], Awaitable[bool]]] = {
        "prune_sessions": services.sessions.prune,
        "prune_attempts": services.attempts.prune,
        "prune_key_usage": services.key_usage.prune,
        "prune_email": services.email.prune,
        "prune_oidc": services.oidc.prune,
    }
    email = {"email": partial(tasks.send_emails, services.email, settings.auth_email_interval_ms)}
    return {
        "outbox": partial(tasks.deliver_outbox, services.outbox, settings.auth_outbox_interval_ms),
        "prune_outbox": partial(tasks.prune, services.outbox.prune, settings.auth_outbox_prune_interval_s),
        "key_usage": partial(tasks.note_key_usage, services.key_usage, settings.auth_key_usage_interval_ms),
        "signing_keys": partial(
            tasks.keep_signing_keys, services.signing_keys, settings.auth_signing_key_refresh_interval_s
        ),
        **{name: partial(tasks.prune, prune, settings.auth_prune_interval_s) for name, prune in prunes.items()},
        **(email if settings.auth_smtp_url is not None else {}),
    }


def create_app(
    settings: AuthSettings, services: Services, readiness: Readiness, clock: Clock, registry: CollectorRegistry
) -> FastAPI:
    """The HTTP application over composed services."""
    ring = IdentityRing(settings.identity_keys.get_secret_value(), clock)
    app = web.create_app("auth", ring=ring, registry=registry, readiness=readiness, description=DESCRIPTION)
    app.state.services = services
    app.state.public_url = settings.public_url
    storage.add_to(app)
    for module in (registration, users, sessions, oidc, organizations, service_accounts, keys, admin, jwks):
        app.include_router(module.router)
    return app


async def compose(
    settings: AuthSettings,
    stack: AsyncExitStack,
    readiness: Readiness,
    *,
    clock: Clock,
    registry: CollectorRegistry,
) -> Services:
    """The use cases over PostgreSQL and Redis; what must be closed goes on the stack."""
    metrics = AuthMetrics(registry)
    engine = database.create_engine(
        settings.auth_database_url.get_secret_value(),
        application="tollgate-auth",
        pool_size=settings.auth_database_pool_size,
    )
    stack.push_async_callback(engine.dispose)
    readiness.add("postgres", partial(database.ping, engine))
    sessions_of = database.session_factory(engine)

    redis = cache.create_redis(
        settings.redis_url.get_secret_value(), client_name="auth", timeout_ms=settings.auth_redis_timeout_ms
    )
    stack.push_async_callback(redis.aclose)
    outbox = Outbox(sessions_of, ChangeChannel(redis), clock, metrics, _outbox_limits(settings))

    passwords = _passwords(settings, metrics)
    stack.callback(passwords.close)
    signing_keys = _signing_keys(settings, sessions_of, clock)
    await signing_keys.load()
    tokens = Tokens(signing_keys, settings.secret_key, clock, access_ttl_s=settings.auth_access_token_ttl_s)

    sign_ins = await stack.enter_async_context(_sign_ins(settings))
    attempts = _attempts(settings, sign_ins, clock)
    accounts = Accounts(sessions_of, passwords, attempts, outbox, clock)
    peppers = Peppers(settings.api_key_peppers.get_secret_value())
    keys_of = Keys(sessions_of, peppers, outbox, clock, metrics, per_org_max=settings.auth_keys_per_org_max)
    limits = _session_limits(settings)
    signed_in = Sessions(sessions_of, sign_ins, passwords, attempts, tokens, clock, outbox, metrics, limits)
    oidc_clients = await _oidc_clients(settings, stack, clock)
    batch_max = settings.auth_prune_batch_max
    email = _email(settings, sessions_of, clock, metrics)
    mode, admin = settings.auth_registration, Admin(sessions_of, keys_of, outbox, clock)
    return Services(
        clock=clock,
        access=Access(sessions_of, clock),
        accounts=accounts,
        attempts=attempts,
        sessions=signed_in,
        oidc=OidcSignIn(sessions_of, oidc_clients, accounts, signed_in, clock, prune_batch_max=batch_max),
        tokens=tokens,
        signing_keys=signing_keys,
        keys=keys_of,
        registration=Registration(sessions_of, mode, accounts, passwords, email, outbox, clock),
        email=email,
        installation=Installation(sessions_of, email, outbox, clock),
        revocations=Revocations(sessions_of, peppers, outbox, clock, metrics),
        organizations=_organizations(settings, sessions_of, outbox, clock),
        admin=admin,
        bootstrap=Bootstrap(sessions_of, accounts, keys_of, admin, outbox, clock),
        outbox=outbox,
        service_accounts=ServiceAccounts(
            sessions_of, outbox, clock, per_org_max=settings.auth_service_accounts_per_org_max
        ),
        key_usage=KeyUsage(
            sessions_of,
            UsageStream(redis),
            clock,
            batch_max=settings.auth_key_usage_batch_max,
            keep_days=settings.auth_key_usage_days,
        ),
    )


def _sign_ins(settings: AuthSettings) -> SignInDatabase:
    return SignInDatabase(
        settings.auth_database_url.get_secret_value(),
        connections_max=settings.auth_sign_in_database_pool_size,
        wait_s=settings.auth_sign_in_database_wait_s,
    )


def _session_limits(settings: AuthSettings) -> SessionLimits:
    return SessionLimits(
        refresh_ttl_s=settings.auth_refresh_token_ttl_s,
        session_ttl_s=settings.auth_session_ttl_s,
        per_user_max=settings.auth_sessions_per_user_max,
        prune_batch_max=settings.auth_prune_batch_max,
    )


def _outbox_limits(settings: AuthSettings) -> OutboxLimits:
    return OutboxLimits(
        batch_max=settings.auth_outbox_batch_max,
        repeat_s=settings.auth_outbox_repeat_s,
        prune_batch_max=settings.auth_prune_batch_max,
    )


def _signing_keys(settings: AuthSettings, sessions_of: async_sessionmaker[AsyncSession], clock: Clock) -> SigningKeys:
    limits = RotationLimits(
        every_s=settings.auth_signing_key_rotation_days * 86_400,
        lead_s=settings.auth_signing_key_lead_s,
        verify_s=settings.auth_access_token_ttl_s + CLOCK_SKEW_S,
    )
    return SigningKeys(sessions_of, settings.secret_key, clock, limits)


def _attempts(settings: AuthSettings, sign_ins: SignInDatabase, clock: Clock) -> Attempts:
    limits = AttemptLimits(
        pair_free=settings.auth_sign_in_pair_free,
        name_free=settings.auth_sign_in_name_free,
        address_free=settings.auth_sign_in_address_free,
        backoff_base_ms=settings.auth_sign_in_backoff_base_ms,
        backoff_max_s=settings.auth_sign_in_backoff_max_s,
        memory_s=settings.auth_sign_in_memory_s,
        prune_batch_max=settings.auth_prune_batch_max,
    )
    return Attempts(sign_ins, settings.secret_key, clock, limits)


def _email(
    settings: AuthSettings, sessions_of: async_sessionmaker[AsyncSession], clock: Clock, metrics: AuthMetrics
) -> Email:
    timeout_s = settings.auth_smtp_timeout_s
    mailer = None
    if settings.auth_smtp_url is not None:
        mailer = Mailer(settings.auth_smtp_url.get_secret_value(), settings.auth_email_from, timeout_s)
    limits = EmailLimits(
        link_url=settings.auth_email_link_url,
        verification_ttl_s=settings.auth_email_verification_ttl_s,
        reset_ttl_s=settings.auth_password_reset_ttl_s,
        waiting_max=settings.auth_email_waiting_max,
        per_address_hourly_max=settings.auth_email_per_address_hourly_max,
        attempts_max=settings.auth_email_attempts_max,
        retry_base_s=settings.auth_email_retry_base_s,
        send_timeout_s=timeout_s,
        prune_batch_max=settings.auth_prune_batch_max,
    )
    return Email(sessions_of, mailer, clock, metrics, limits)


async def _oidc_clients(settings: AuthSettings, stack: AsyncExitStack, clock: Clock) -> dict[str, OidcClient]:
    timeout_s = settings.auth_oidc_timeout_s
    http = await stack.enter_async_context(httpx.AsyncClient(timeout=timeout_s, trust_env=False))
    base = settings.public_url.rstrip("/")
    return {
        provider.name: OidcClient(provider, f"{base}/api/v1/auth/oidc/{provider.name}/callback", http, clock, timeout_s)
        for provider in settings.auth_oidc_providers
    }


def _organizations(
    settings: AuthSettings, sessions_of: async_sessionmaker[AsyncSession], outbox: Outbox, clock: Clock
) -> Organizations:
    limits = OrganizationLimits(
        self_service=settings.auth_self_service_orgs,
        per_user_max=settings.auth_orgs_per_user_max,
        members_max=settings.auth_members_per_org_max,
        invitations_max=settings.auth_invitations_per_org_max,
        invitation_ttl_s=settings.auth_invitation_ttl_s,
    )
    return Organizations(sessions_of, outbox, clock, limits)


def _passwords(settings: AuthSettings, metrics: AuthMetrics) -> Passwords:
    hasher = argon2.PasswordHasher(
        time_cost=settings.auth_argon2_time_cost,
        memory_cost=settings.auth_argon2_memory_kib,
        parallelism=settings.auth_argon2_parallelism,
    )
    return Passwords(
        hasher,
        threads=settings.auth_argon2_threads,
        queue_max=settings.auth_argon2_queue_max,
        nice=settings.auth_argon2_nice,
        jobs=metrics.password_jobs,
    )
