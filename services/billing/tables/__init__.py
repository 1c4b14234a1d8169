"""The tables of schema `billing`: what the migrations make, and the rights of the service's own role.

Amounts are int8 nano-credits. A wallet's id is its organisation's id.
"""

from services.billing.tables import customers, ledger, reconciliation, webhooks
from services.billing.tables.ledger import APPEND_ONLY as APPEND_ONLY
from services.billing.tables.schema import tables as tables

# What the service's own role may do; `migrate` gives it exactly this.
SERVICE_GRANTS = {
    **ledger.SERVICE_GRANTS,
    **customers.SERVICE_GRANTS,
    **webhooks.SERVICE_GRANTS,
    **reconciliation.SERVICE_GRANTS,
}
