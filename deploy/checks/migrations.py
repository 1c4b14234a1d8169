"""Every service's migrations make the tables that its code declares: `python -m deploy.checks.migrations`.

On a PostgreSQL of its own: `python -m services.<s> migrate` twice, since it must be idempotent, then `alembic check`.
"""

import os
import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.util import CommandError

from deploy.local.errors import LaunchError
from deploy.local.seed import migrated_services, run_module
from deploy.local.stack import Stack
from deploy.local.state import Layout
from shared.database import alembic_config

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Check all; 1 when a service's tables and migrations differ."""
    with tempfile.TemporaryDirectory(prefix="tollgate-check-") as directory:
        stack = Stack(Layout(ROOT, Path(directory) / "state"), 1, os.environ)
        try:
            stack.start_data_stores()
            return _check(stack)
        except LaunchError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            stack.down()


def _check(stack: Stack) -> int:
    failed = 0
    for service in migrated_services(ROOT):
        for _ in range(2):
            run_module(stack.layout, (f"services.{service}", "migrate"), stack.services.administration(service))
        try:
            command.check(alembic_config(service, stack.postgres.url()))
            print(f"migrations: {service} is at its head and complete")
        except CommandError as error:
            print(f"migrations: {service}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
