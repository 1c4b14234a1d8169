"""What customers and operators reach over REST, constructed in order."""

from __future__ import annotations

from fastapi import FastAPI

from services.billing.ledger.writer import Ledger
from services.billing.repository.database import Database
from services.billing.routes import admin, budgets, prices, transactions, usage, wallet
from services.billing.service import Budgets, History, Prices, Wallets
from services.billing.storefront_settings import StorefrontSettings

NOUNS = (wallet, transactions, usage, budgets, prices, admin)


def open_storefront(app: FastAPI, settings: StorefrontSettings, database: Database, ledger: Ledger) -> None:
    """Give the application its services and routes."""
    app.state.wallets = Wallets(database, ledger)
    app.state.history = History(database, exports_max=settings.billing_exports_max)
    app.state.budgets = Budgets(database, ledger)
    app.state.prices = Prices(database)
    for noun in NOUNS:
        app.include_router(noun.router)
