"""The use cases of auth, one file a noun, one verb a method."""

from __future__ import annotations

from dataclasses import dataclass

from services.auth.service.access import Access
from services.auth.service.accounts import Accounts
from services.auth.service.admin import Admin
from services.auth.service.attempts import Attempts
from services.auth.service.bootstrap import Bootstrap
from services.auth.service.email import Email
from services.auth.service.installation import Installation
from services.auth.service.key_usage import KeyUsage
from services.auth.service.keys import Keys
from services.auth.service.oidc import OidcSignIn
from services.auth.service.organizations import Organizations
from services.auth.service.outbox import Outbox
from services.auth.service.registration import Registration
from services.auth.service.revocations import Revocations
from services.auth.service.service_accounts import ServiceAccounts
from services.auth.service.sessions import Sessions
from services.auth.service.signing import SigningKeys
from services.auth.service.tokens import Tokens
from shared.clock import Clock


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that routes, tasks and the command line call; app.py makes it."""

    clock: Clock
    access: Access
    accounts: Accounts
    sessions: Sessions
    attempts: Attempts
    tokens: Tokens
    signing_keys: SigningKeys
    keys: Keys
    registration: Registration
    email: Email
    revocations: Revocations
    organizations: Organizations
    admin: Admin
    bootstrap: Bootstrap
    installation: Installation
    outbox: Outbox
    oidc: OidcSignIn
    key_usage: KeyUsage
    service_accounts: ServiceAccounts
