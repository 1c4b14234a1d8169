"""Billing's use cases beside the ledger's own operations, one noun a file."""

from services.billing.service.alerts import Alerts as Alerts
from services.billing.service.author import Author as Author
from services.billing.service.budgets import Budgets as Budgets
from services.billing.service.history import History as History
from services.billing.service.invoices import Invoices as Invoices
from services.billing.service.prices import Prices as Prices
from services.billing.service.topups import TopUps as TopUps
from services.billing.service.topups import TopUpTerms as TopUpTerms
from services.billing.service.wallets import Wallets as Wallets
from services.billing.service.webhooks import Webhooks as Webhooks
