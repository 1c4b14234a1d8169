"""The only client of the ledger: hold credits, do the work, settle what was used, whatever happens to the request.

    async with metering.hold(identity, model="chat-mini", input_tokens=31, max_output_tokens=256, clamp=True) as hold:
        async for chunk in generate(max_tokens=hold.output_tokens):
            hold.record(Usage(input_tokens=31, output_tokens=chunk.completion_tokens))  # cumulative, cheap
            ...
        receipt = await hold.settle(build="chat-mini-q8_0", finish_reason="stop")

How a hold ends:
- `settle` posts the usage and releases the rest. It waits at most `settle_wait_s` for the ledger; when that is away, or
  fails in any way that is not a refusal, it returns None and goes on trying in the background for
  `resolution_timeout_s`, with the same id, so nothing is taken twice.
- A block that is left without `settle` (exception, cancellation, return) settles what was recorded if any output
  token was, with finish_reason `cancelled` or `error`; otherwise it voids the hold. Cancellation does not reach the
  resolution: that runs in a task of its own, and `Metering.close` waits for it.
- Meanwhile heartbeats, soon after the first output token and every third of the hold's life, extend it and store the
  usage so far. When this process dies, or the ledger stays away too long, billing's sweeper settles that usage once the
  hold has expired; a settlement that comes later still posts only the remainder.

A hold that was clamped can be asked to cover more while the work goes on: `hold.extend`, which raises as entering
does and leaves the hold as it was then.

Raises from entering: PaymentRequired (`insufficient_quota`, `credits_reserved`), NotFound (`model_not_priced`),
PermissionDenied (`wallet_frozen`), Conflict, Unprocessable (`idempotency_mismatch`), InvalidRequest, Unavailable.
Nothing else raises but cancellation: an answer that the client has already read does not fail over its bill.
"""

from shared.metering.client import REFUSAL_STATUSES as REFUSAL_STATUSES
from shared.metering.client import Metering as Metering
from shared.metering.hold import Hold as Hold
from shared.metering.types import MeteringLimits as MeteringLimits
from shared.metering.types import Price as Price
from shared.metering.types import Receipt as Receipt
from shared.metering.types import Usage as Usage
