"""The output tokens that a clamped hold covers, and more of them while a stream goes on.

    covered 100    at 80: ask for more, and go on    at 101: wait for the answer, ask once more, or end

A chunk costs one comparison. At most one question is under way. Credits that came meanwhile, or that other requests
gave back, let the stream go on; without them it ends before the first token that is not covered.
"""

from __future__ import annotations

import asyncio
import sys

from shared.errors import TollgateError
from shared.metering import Hold
from shared.telemetry import get_logger

log = get_logger(__name__)

UNBOUNDED = sys.maxsize
AHEAD = 5  # a fifth of what is covered is left when more is asked for
MORE_TOKENS_MIN = 64
CREDITS, BILLING = "credits", "billing"
_REASONS = {
    "insufficient_quota": CREDITS,
    "credits_reserved": CREDITS,
    "budget_exceeded": "budget",
    "wallet_frozen": "frozen",
}


class Allowance:
    """Of one completion that may have `wanted` output tokens, all choices together.

    Ask `admits` when output has come to `mark`. `limited_by`: what ended it, once it has answered no.
    """

    def __init__(self, hold: Hold, wanted: int) -> None:
        self.mark = UNBOUNDED
        self.limited_by: str | None = None
        self._hold = hold
        self._wanted = wanted
        self._refused = ""
        self._asking: asyncio.Task[None] | None = None
        self._set_mark()

    async def admits(self, output_tokens: int) -> bool:
        """Whether so many are covered; waits for the ledger only if they are not."""
        if output_tokens <= self._hold.output_tokens:
            self.mark = self._hold.output_tokens + 1
            self._ask()
            return True
        if self._asking is not None:
            await asyncio.wait({self._asking})
        if output_tokens > self._hold.output_tokens:  # what was refused then may be there now
            await asyncio.wait({self._ask()})
        if output_tokens <= self._hold.output_tokens:
            return True
        self.limited_by = _REASONS.get(self._refused, BILLING)
        return False

    def close(self) -> None:
        """Nobody waits for an answer any more."""
        if self._asking is not None:
            self._asking.cancel()

    def _ask(self) -> asyncio.Task[None]:
        if self._asking is None:
            self._asking = asyncio.create_task(self._extend())
        return self._asking

    async def _extend(self) -> None:
        """Twice as much, so that streams of one wallet share what it has; the ledger gives what there is."""
        covered = self._hold.output_tokens
        try:
            await self._hold.extend(min(self._wanted, max(2 * covered, covered + MORE_TOKENS_MIN)))
        except TollgateError as e:
            self._refused = e.code
            log.info("hold_not_extended", hold_id=str(self._hold.id), code=e.code)
        else:
            self._refused = "insufficient_quota"  # if it is not enough
            self._set_mark()
        finally:
            self._asking = None

    def _set_mark(self) -> None:
        covered = self._hold.output_tokens
        left = covered - self._hold.usage.output_tokens
        self.mark = UNBOUNDED if covered >= self._wanted else covered - left // AHEAD
