"""`python -m tests.billing.failing_service POINT COUNT`: billing that kills itself when it comes to a failpoint.

As `python -m services.billing`, but for the SIGKILL of its own at the COUNT-th time that the point is reached.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import cast

from services.billing.app import build
from services.billing.ledger import failpoints
from services.billing.settings import BillingSettings
from shared import runtime


def main() -> None:
    point, times = cast(failpoints.Failpoint, sys.argv[1]), int(sys.argv[2])
    numbers = count(1)

    def reached() -> None:
        if next(numbers) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.arm(point, reached)
    runtime.main("billing", BillingSettings, build)


if __name__ == "__main__":
    main()
