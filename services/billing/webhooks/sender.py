"""Sends one message, and says what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from services.billing.errors import UnsafeDestination
from services.billing.webhooks.destination import PublicResolver, check_url
from services.billing.webhooks.signature import headers

RETRY_AFTER_MAX_S = 3_600.0
USER_AGENT = "Tollgate-Webhooks/1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` of the answer, or what kept it from coming; `retry_after_s` if the receiver asked for it."""

    status: int | None
    error: str | None = None
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """The receiver wants no more."""
        return self.status == 410


class WebhookSender:
    """One for the life of the process. `private` lets messages go to private addresses, for development."""

    def __init__(self, *, timeout_s: float, connections_max: int, private: bool) -> None:
        default = aiohttp.ThreadedResolver()
        connector = aiohttp.TCPConnector(
            resolver=default if private else PublicResolver(default),
            use_dns_cache=False,
            force_close=True,
            limit=connections_max,
        )
        self._private = private
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            trust_env=False,
            headers={"user-agent": USER_AGENT, "content-type": "application/json"},
        )

    async def send(self, url: str, secrets: Sequence[bytes], message_id: str, body: str) -> Outcome:
        """Raises nothing: a message that cannot be sent has an outcome too. The answer's body is not read."""
        try:
            check_url(url, private=self._private)
            signed = headers(secrets, message_id, int(time.time()), body)
            async with self._session.post(url, data=body.encode(), headers=signed, allow_redirects=False) as answer:
                return Outcome(answer.status, retry_after_s=_retry_after_s(answer))
        except (aiohttp.ClientError, UnsafeDestination, TimeoutError, OSError) as e:
            return Outcome(None, type(e).__name__)

    async def close(self) -> None:
        """Close what is open."""
        await self._session.close()


def _retry_after_s(answer: aiohttp.ClientResponse) -> float | None:
    text = answer.headers.get("retry-after", "")
    if answer.status not in (429, 503) or not (text.isascii() and text.isdigit()) or len(text) > 9:
        return None
    return min(float(text), RETRY_AFTER_MAX_S)
