"""What customers and operators reach over REST, constructed in order."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI

from services.billing.domain import parse_credits
from services.billing.ledger.writer import Ledger
from services.billing.payments.manual import ManualPayments
from services.billing.payments.port import PaymentProvider
from services.billing.payments.stripe import StripeAccount, StripePayments
from services.billing.repository.database import Database
from services.billing.routes import (
    admin,
    budgets,
    invoices,
    native,
    prices,
    topups,
    transactions,
    usage,
    wallet,
    webhooks,
)
from services.billing.service import Alerts, Budgets, History, Invoices, Prices, TopUps, TopUpTerms, Wallets, Webhooks
from services.billing.service.deliveries import Deliveries, DeliveryLimits
from services.billing.storefront_settings import StorefrontSettings
from services.billing.webhooks.sender import WebhookSender
from services.billing.webhooks.signature import SecretRing
from shared.clock import SystemClock
from shared.telemetry import BillingMetrics

NOUNS = (wallet, transactions, usage, invoices, topups, budgets, webhooks, prices, native, admin)

Tasks = dict[str, Callable[[], Coroutine[Any, Any, None]]]


def open_storefront(
    app: FastAPI,
    settings: StorefrontSettings,
    database: Database,
    ledger: Ledger,
    metrics: BillingMetrics,
    stack: AsyncExitStack,
) -> Tasks:
    """Give the application its services and routes; what has to run beside them."""
    app.state.wallets = Wallets(database, ledger)
    app.state.history = History(database, SystemClock(), exports_max=settings.billing_exports_max)
    app.state.budgets = Budgets(database, ledger)
    app.state.prices = Prices(database)
    app.state.invoices = Invoices(database, SystemClock())

    providers = _providers(settings)
    for provider in providers.values():
        stack.push_async_callback(provider.close)
    app.state.topups = TopUps(database, ledger, providers, _terms(settings), SystemClock(), metrics)

    keys = settings.billing_secret_keys
    ring = None if keys is None else SecretRing(keys.get_secret_value())
    app.state.webhooks = Webhooks(database, ledger, ring, private=settings.billing_webhook_private)
    app.state.alerts = Alerts(database, ledger)

    for noun in NOUNS:
        app.include_router(noun.router)
    tasks: Tasks = {
        "topups": partial(
            app.state.topups.watch, settings.billing_topup_watch_interval_s, settings.billing_topup_unchecked_s
        )
    }
    if ring is not None:
        tasks["alerts"] = partial(app.state.alerts.run, settings.billing_alert_interval_s)
        tasks["webhooks"] = _deliveries(settings, database, ring, metrics, stack).run
    return tasks


def _deliveries(
    settings: StorefrontSettings, database: Database, ring: SecretRing, metrics: BillingMetrics, stack: AsyncExitStack
) -> Deliveries:
    limits = DeliveryLimits(
        retries_s=settings.billing_webhook_retries_s,
        in_flight_max=settings.billing_webhooks_in_flight_max,
        per_endpoint_max=settings.billing_webhooks_per_endpoint_max,
        timeout_s=settings.billing_webhook_timeout_s,
        interval_s=settings.billing_webhook_interval_s,
        kept_s=settings.billing_webhook_kept_s,
    )
    sender = WebhookSender(
        timeout_s=limits.timeout_s,
        connections_max=limits.in_flight_max,
        private=settings.billing_webhook_private,
    )
    stack.push_async_callback(sender.close)
    return Deliveries(database, sender, ring, limits, metrics)


def _providers(settings: StorefrontSettings) -> dict[str, PaymentProvider]:
    providers: list[PaymentProvider] = [ManualPayments()]
    if settings.stripe_secret_key is not None and settings.stripe_webhook_secret is not None:
        account = StripeAccount(
            secret_key=settings.stripe_secret_key.get_secret_value(),
            webhook_secret=settings.stripe_webhook_secret.get_secret_value(),
            api_url=settings.stripe_api_url,
            return_url=settings.public_url,
            timeout_s=settings.stripe_timeout_s,
            retries_max=settings.stripe_retries_max,
        )
        providers.append(StripePayments(account))
    return {provider.name: provider for provider in providers}


def _terms(settings: StorefrontSettings) -> TopUpTerms:
    return TopUpTerms(
        currency=settings.topup_currency,
        minor_nano_per_credit=parse_credits(settings.topup_price_minor),
        amount_min=parse_credits(settings.topup_credits_min),
        amount_max=parse_credits(settings.topup_credits_max),
    )
