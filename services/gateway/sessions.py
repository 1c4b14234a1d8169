"""Sessions behind access tokens: a token stands only with the present version of its session.

As with keys: the admission script wants a positive match of the version in Redis, and where it finds another or none,
`confirm` asks PostgreSQL. So a token ends with its session, at the next request, and an emptied Redis lets nothing
through. Nothing is kept in this process.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from services.gateway.flights import Flights
from services.gateway.repository import DatabaseUnavailable, KeyRepository
from services.gateway.tokens import AccessToken
from shared import apikeys
from shared.clock import Clock
from shared.errors import Unauthenticated, Unavailable
from shared.limits import Link, RedisUnavailable, Script

FILL = Path(__file__).parent / "fill.lua"


class SessionStore:
    """See the module."""

    def __init__(self, repository: KeyRepository, link: Link, clock: Clock) -> None:
        self._repository = repository
        self._fill = Script.read(link, FILL)
        self._clock = clock
        self._flights: Flights[bool] = Flights()

    async def confirm(self, token: AccessToken) -> bool:
        """Whether Redis knows now that the token's session stands; PostgreSQL says that it does.

        Raises Unauthenticated for a session that ended or changed, Unavailable where nobody can tell.
        """
        flight = self._flights.begun_from_now_on(
            f"{token.identity.session_id} {token.version}", partial(self._read_and_fill, token)
        )
        try:
            return await asyncio.shield(flight)
        except DatabaseUnavailable as e:
            raise Unavailable(
                "Tokens cannot be checked right now. Retry.", retry_after_s=1, detail=f"PostgreSQL: {e}"
            ) from e

    async def _read_and_fill(self, token: AccessToken) -> bool:
        session = await self._repository.find_session(token.identity.session_id)
        if session is None or not session.carries(token.identity, token.version, self._clock.now()):
            raise Unauthenticated()
        try:
            # Overtaken by a higher version, the next admission says so, and this is asked again.
            await self._fill((token.version_name,), (token.version, apikeys.CACHE_TTL_S))
        except RedisUnavailable:
            return False
        return True
