"""Sign-in through OpenID providers.

    start ─► provider ─► callback with state and code ─► code against ID token (PKCE, nonce) ─► account ─► session

The state comes back twice, in the address and in a cookie of the browser that began: nobody is signed in to somebody
else's account by a link. Accounts are found by issuer and subject, never by a name; by address only where the operator
says that the provider speaks for every address, and both sides have verified it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients.oidc import OidcClient
from services.auth.domain import Account, AuditEntry, Origin, UserStatus
from services.auth.domain.fields import valid_email
from services.auth.domain.oidc import ExternalPerson, OidcFlow, OidcProvider, is_own_page, username_from
from services.auth.errors import AccountExists, OidcRefused, ProviderNotFound
from services.auth.repository import audit
from services.auth.repository.accounts import AccountRepository
from services.auth.repository.external import ExternalRepository
from services.auth.repository.service_accounts import NO_PASSWORD
from services.auth.service.accounts import Accounts
from services.auth.service.sessions import Sessions, TokenPair
from shared.clock import Clock
from shared.database import AsyncSession
from shared.errors import InvalidRequest

FLOW_LIFETIME_S = 600
STATE_BYTES = 32


class OidcSignIn:
    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        clients: Mapping[str, OidcClient],
        accounts: Accounts,
        signed_in: Sessions,
        clock: Clock,
        *,
        prune_batch_max: int,
    ) -> None:
        self._sessions = sessions
        self._clients = clients
        self._accounts = accounts
        self._signed_in = signed_in
        self._clock = clock
        self._prune_batch_max = prune_batch_max

    def providers(self) -> list[str]:
        return list(self._clients)

    async def start(self, provider: str, return_to: str) -> tuple[str, str]:
        """Where to send the person, and the state to keep in their browser. `return_to` "" asks for tokens.

        Raises ProviderNotFound, InvalidRequest, OidcUnavailable.
        """
        client = self._client(provider)
        if return_to and not is_own_page(return_to):
            raise InvalidRequest("return_to: give a path of this installation.", param="return_to")
        state = secrets.token_urlsafe(STATE_BYTES)
        expires_at = self._clock.now() + timedelta(seconds=FLOW_LIFETIME_S)
        nonce, verifier = secrets.token_urlsafe(STATE_BYTES), secrets.token_urlsafe(STATE_BYTES)
        flow = OidcFlow(provider, nonce, verifier, return_to, expires_at)
        url = await client.authorization_url(flow, state)
        async with self._sessions.begin() as session:
            await ExternalRepository(session).add_flow(_digest(state), flow)
        return url, state

    async def finish(self, provider: str, *, code: str, state: str, kept: str, origin: Origin) -> tuple[TokenPair, str]:
        """A session for whom the provider vouches for, and where the person goes now.

        Raises ProviderNotFound, OidcRefused, OidcUnavailable, AccountExists.
        """
        client = self._client(provider)
        if not hmac.compare_digest(state.encode(), kept.encode()):
            raise OidcRefused(detail="state of another browser")
        async with self._sessions.begin() as session:
            flow = await ExternalRepository(session).take_flow(_digest(state), provider, self._clock.now())
        if flow is None:
            raise OidcRefused(detail="unknown or expired state")
        account = await self._account(client.provider, await client.person(flow, code), origin)
        pair = await self._signed_in.open_external(account, origin, browser=bool(flow.return_to))
        return pair, flow.return_to

    async def prune(self) -> bool:
        """Delete one batch of sign-ins that nobody finished; whether there may be more."""
        async with self._sessions.begin() as session:
            gone = await ExternalRepository(session).prune_flows(self._clock.now(), self._prune_batch_max)
        return gone == self._prune_batch_max

    def _client(self, provider: str) -> OidcClient:
        if provider not in self._clients:
            raise ProviderNotFound()
        return self._clients[provider]

    async def _account(self, provider: OidcProvider, person: ExternalPerson, origin: Origin) -> Account:
        now = self._clock.now()
        async with self._sessions.begin() as session:
            external, accounts = ExternalRepository(session), AccountRepository(session)
            user_id = await external.user_of(person)
            if user_id is not None:
                account = await accounts.find_first(user_id)
                if account is None or account.status is not UserStatus.ACTIVE:
                    raise OidcRefused(detail="account disabled or gone")
                return account
            if not person.email or not person.email_verified:
                raise OidcRefused("The provider does not vouch for your e-mail address.", code="email_not_verified")
            account = await accounts.find_by_email(person.email)
            if account is None:
                account = await self._make(session, provider, person, origin)
            elif not provider.link_by_email or not await accounts.has_verified_email(account.user_id):
                raise AccountExists()
            elif account.status is not UserStatus.ACTIVE:
                raise OidcRefused(detail="account disabled")
            await external.link(person, account.user_id, now)
            await accounts.set_email_verified(account.user_id, account.email, now)
            await audit.append(session, _linked(account, provider, origin), now)
            found = await accounts.find_first(account.user_id)
        assert found is not None, "made or found in this transaction"
        return found

    async def _make(
        self, session: AsyncSession, provider: OidcProvider, person: ExternalPerson, origin: Origin
    ) -> Account:
        if not provider.create_users:
            raise OidcRefused("You have no account here. Ask an operator for one.", code="no_account")
        try:
            email = valid_email(person.email)
        except ValueError as e:
            raise OidcRefused(detail="email") from e
        username = username_from(person.username)
        if await AccountRepository(session).holds_username(username):
            username = f"{username}-{secrets.token_hex(3)}"
        account = self._accounts.new(username=username, email=email, password_hash=NO_PASSWORD)
        await self._accounts.add(session, account, origin)
        return account


def _linked(account: Account, provider: OidcProvider, origin: Origin) -> AuditEntry:
    details: dict[str, object] = {"provider": provider.name}
    return AuditEntry(
        "user.identity_linked", "user", account.user_id, account.user_id, None, account.org_id, origin, details
    )


def _digest(state: str) -> str:
    return hashlib.sha256(state.encode()).hexdigest()
