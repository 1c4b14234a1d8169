"""Limits on requests: no interval of a minute, an hour or a day ever admits more than its quota.

    Subject + weight ──► RedisLimiter ── one script, server's clock ──► Decision ──► headers
                     └─► LocalLimiter ── while Redis is away, a share each ──┘

Tokens per minute, reserved before they are used: shared/limits/tokens.py.

Consistency: one Redis script sees and writes all of a subject's state, so any number of processes are exact together.
Minute and hour are exact to the microsecond of the server's clock; the day is counted in five-minute cells of which
the oldest counts whole: its capacity comes back up to five minutes late, never early. A refusal records nothing.

Failure modes: Redis away: `RedisUnavailable`, and the caller turns to LocalLimiter. Redis restarted empty: windows
begin anew, one quota more at most. Clock of Redis set back: time stands still for a subject until it catches up;
set forward: windows pass too early by as much. A process killed: its leases expire after their TTL.
"""

from shared.limits.cluster import ClusterLink, create_link
from shared.limits.headers import admitted_headers, rate_limit_headers, token_headers
from shared.limits.limiter import Question, RedisLimiter
from shared.limits.link import CommandRefused, Hearer, Link, RedisLink, RedisUnavailable, Waiting
from shared.limits.local import LocalLimiter, TooManySubjects
from shared.limits.policy import Decision, Lease, Limits, Subject, Verdict, WindowState
from shared.limits.resp import encoded
from shared.limits.scripts import Script
from shared.limits.tokens import Reservation, TokenDecision, TokenLimiter, TokenSubject

__all__ = [
    "ClusterLink",
    "CommandRefused",
    "Decision",
    "Hearer",
    "Lease",
    "Limits",
    "Link",
    "LocalLimiter",
    "Question",
    "RedisLimiter",
    "RedisLink",
    "RedisUnavailable",
    "Reservation",
    "Script",
    "Subject",
    "TokenDecision",
    "TokenLimiter",
    "TokenSubject",
    "TooManySubjects",
    "Verdict",
    "Waiting",
    "WindowState",
    "admitted_headers",
    "create_link",
    "encoded",
    "rate_limit_headers",
    "token_headers",
]
