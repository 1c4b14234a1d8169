"""The inference service, put together."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

from services.inference.canary import Patience
from services.inference.domain import Room
from services.inference.repository import DesiredFile
from services.inference.routes import models as models_routes
from services.inference.routes import texts as texts_routes
from services.inference.service import Models, any_ready
from services.inference.servicer import CatalogueServicer
from services.inference.settings import Settings
from services.inference.tasks import Pace, Watcher
from services.inference.texts import Texts
from services.inference.triton import TritonServer
from shared.clock import SystemClock
from shared.flags import Flags
from shared.grpc import Caller, create_server
from shared.identity import IdentityRing
from shared.metering import Metering
from shared.rpc import inference_pb2_grpc
from shared.runtime import HttpServer, Service
from shared.telemetry import GrpcMetrics, InferenceMetrics, new_registry
from shared.web import Readiness, create_app

NAME = "inference"


async def build(settings: Settings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    """Construct everything, in order. Raises CatalogueInvalid."""
    clock = SystemClock()
    ring = IdentityRing(settings.identity_keys.get_secret_value(), clock)
    registry = new_registry()

    triton = TritonServer(
        settings.triton_grpc,
        control_timeout_s=settings.inference_control_timeout_ms / 1000,
        load_timeout_s=settings.inference_load_timeout_ms / 1000,
    )
    stack.push_async_callback(triton.close)
    patience = Patience(
        canary_s=settings.inference_canary_timeout_ms / 1000,
        first_token_s=settings.inference_first_token_timeout_ms / 1000,
        reload_quiet_s=settings.inference_canary_timeout_ms / 1000,
        probe_interval_s=settings.inference_probe_interval_ms / 1000,
        probe_s=settings.inference_probe_timeout_ms / 1000,
        idle_s=settings.inference_idle_unload_ms / 1000,
    )
    models = Models(
        settings.model_repository,
        triton,
        InferenceMetrics(registry),
        clock,
        patience,
        DesiredFile(settings.inference_desired_file or settings.model_repository / "desired.json"),
        Room(settings.inference_memory_share_max, settings.inference_loaded_builds_max),
    )
    readiness.add("models", partial(any_ready, models))
    watcher = Watcher(
        models,
        Pace(
            poll_s=settings.inference_poll_interval_ms / 1000,
            canary_failures_max=settings.inference_canary_failures_max,
            backoff_min_s=settings.inference_backoff_min_ms / 1000,
            backoff_max_s=settings.inference_backoff_max_ms / 1000,
        ),
    )

    app = create_app(NAME, ring=ring, registry=registry, readiness=readiness)
    wait_max_s = settings.inference_ensure_wait_max_ms / 1000
    flags = Flags(settings.flag_settings())
    stack.push_async_callback(flags.close)
    await flags.start()
    billing = Caller(settings.billing_grpc, ring, service=NAME)
    stack.push_async_callback(billing.close)
    metering = Metering(billing)
    stack.push_async_callback(metering.close)
    texts = Texts(models, triton, flags, metering, settings.text_limits())
    app.include_router(texts_routes.router(texts))
    app.include_router(models_routes.router(models, wait_max_s))
    grpc = create_server(ring, GrpcMetrics(registry, NAME))
    inference_pb2_grpc.add_CatalogueServicer_to_server(CatalogueServicer(models, wait_max_s), grpc)

    return Service(
        http=[HttpServer(app, settings.inference_http_listen)],
        grpc=grpc,
        grpc_listen=settings.inference_grpc_listen,
        tasks={"watcher": watcher.run},
    )
