"""Chat, put together: what there is, in the order in which it is made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from services.chat import tasks
from services.chat.clients import CatalogueClient
from services.chat.domain.breaker import Breakers
from services.chat.domain.catalogue import BuildState
from services.chat.errors import model_loading
from services.chat.repository.replays import ReplayRepository
from services.chat.repository.stored import StoredRepository
from services.chat.routes import completions, messages, models, responses, stored, text_completions, tokenize
from services.chat.routes.desk import Desk
from services.chat.service.cache import CacheLimits, ResponseCache
from services.chat.service.completion import ChatService
from services.chat.service.library import Library
from services.chat.service.replays import Replays
from services.chat.service.terms import Treasury
from services.chat.settings import ChatSettings
from services.chat.triton import TritonClient
from shared import database, telemetry, web
from shared.clock import Clock, SystemClock
from shared.flags import Flags
from shared.grpc import Caller
from shared.identity import IdentityRing
from shared.limits import Link, TokenLimiter, create_link
from shared.metering import Metering
from shared.runtime import HttpServer, Service
from shared.web import Readiness

CLAIM_MARGIN_S = 30.0  # an idempotency key stays busy for as long as its generation may take, and a little more


async def build(settings: ChatSettings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    """Everything of this service. Waits for nobody: what is down at start is asked again later."""
    clock, registry = SystemClock(), telemetry.new_registry()
    ring = IdentityRing(settings.identity_keys.get_secret_value(), clock)
    metrics = telemetry.ChatMetrics(registry)
    limits = settings.limits()

    flags = Flags(settings.flag_settings())
    stack.push_async_callback(flags.close)
    await flags.start()
    metrics.flags_age_s.set_function(lambda: flags.state().age_s or 0.0)

    inference = Caller(settings.inference_grpc, ring, service="chat")
    stack.push_async_callback(inference.close)
    breakers = Breakers(
        failures_max=settings.chat_breaker_failures_max,
        pause_s=settings.chat_breaker_pause_ms / 1000,
        now_s=clock.monotonic_s,
    )
    catalogue = CatalogueClient(inference, on_return=breakers.forget)

    billing = Caller(settings.billing_grpc, ring, service="chat")
    stack.push_async_callback(billing.close)
    metering = Metering(billing, limits=settings.metering_limits(), failures=metrics.resolution_failures)
    stack.push_async_callback(metering.close)

    triton = TritonClient(limits)
    stack.push_async_callback(triton.close)

    link = create_link(
        settings.redis_url.get_secret_value(), client_name="chat", timeout_ms=settings.chat_redis_timeout_ms
    )
    await stack.enter_async_context(link)
    treasury = Treasury(metering, TokenLimiter(link, clock, processes=settings.chat_processes), triton, limits)
    service = ChatService(
        catalogue=catalogue,
        flags=flags,
        treasury=treasury,
        triton=triton,
        breakers=breakers,
        limits=limits,
        metrics=metrics,
    )

    desk, library, purges = _desk(settings, stack, clock, service, treasury, link)
    app = web.create_app("chat", ring=ring, registry=registry, readiness=readiness, description=__doc__)
    for router in (
        completions.create_router(desk),
        text_completions.create_router(desk),
        tokenize.create_router(service, treasury),
        stored.create_router(library),
        stored.create_accounts_router(library),
        responses.create_router(desk),
        messages.create_router(desk),
        models.create_router(service, treasury),
    ):
        app.include_router(router)
    readiness.add("catalogue", _catalogue_check(catalogue))
    readiness.add("billing", _billing_check(metering))

    pauses_s = settings.catalogue_refresh_ms / 1000, settings.catalogue_refresh_loading_ms / 1000
    return Service(
        http=[HttpServer(app, settings.chat_http_listen)],
        tasks={
            "catalogue": lambda: tasks.keep_catalogue(catalogue, *pauses_s),
            "purge": lambda: tasks.keep_purging(purges, settings.chat_purge_interval_s),
        },
    )


def _desk(
    settings: ChatSettings,
    stack: AsyncExitStack,
    clock: Clock,
    service: ChatService,
    treasury: Treasury,
    link: Link,
) -> tuple[Desk, Library, Sequence[tasks.Purge]]:
    """What stands between the routes and the service: cache, kept completions, idempotency keys."""
    engine = database.create_engine(
        settings.chat_database_url.get_secret_value(),
        application="tollgate-chat",
        pool_size=settings.chat_database_connections_max,
        pool_overflow=0,
    )
    stack.push_async_callback(engine.dispose)
    kept = StoredRepository(engine, retention_days=settings.chat_retention_days)
    results = ReplayRepository(
        engine,
        busy_s=service.limits.generation_timeout_s + CLAIM_MARGIN_S,
        kept_s=settings.chat_replay_kept_h * 3_600,
    )
    replays = Replays(results, settings.chat_left_running_max)
    stack.push_async_callback(replays.close, settings.drain_timeout_s)
    cache = ResponseCache(
        service, treasury, link, CacheLimits(settings.chat_cache_ttl_s, settings.chat_cache_bytes_max)
    )
    library = Library(kept, clock)
    return Desk(service, cache, library, replays, clock), library, (kept.purge, results.purge)


def _catalogue_check(catalogue: CatalogueClient) -> web.Check:
    """Ready means that a model can be served, whatever the flags say: a build of it is there."""

    async def check() -> None:
        models = catalogue.last.models.values()
        if not any(model.state is BuildState.READY for model in models):
            raise model_loading(", ".join(model.alias for model in models))

    return check


def _billing_check(metering: Metering) -> web.Check:
    async def check() -> None:
        await metering.prices()

    return check
