"""The tables of schema `billing`: what the migrations make, and the rights of the service's own role.

Amounts are int8 nano-credits. A wallet's id is its organisation's id.
"""

from services.billing.tables import customers, invoices, ledger, reconciliation, webhooks
from services.billing.tables.schema import tables as tables

# What is written once: no right to change it, and triggers that refuse even the owner.
APPEND_ONLY = (*ledger.APPEND_ONLY, *invoices.APPEND_ONLY)

# What the service's own role may do; `migrate` gives it exactly this.
SERVICE_GRANTS = {
    **ledger.SERVICE_GRANTS,
    **customers.SERVICE_GRANTS,
    **webhooks.SERVICE_GRANTS,
    **invoices.SERVICE_GRANTS,
    **reconciliation.SERVICE_GRANTS,
}
