"""The command line: `python -m services.auth [migrate | bootstrap | users | orgs | keys | signing-keys] …`; without a
command it serves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry

from services.auth.app import build, compose
from services.auth.cli import operator
from services.auth.cli.roles import DEFAULT_SCOPES, Role
from services.auth.domain.fields import valid_email, valid_key_name, valid_limit, valid_username
from services.auth.grants import GATEWAY_GRANTS, SERVICE_GRANTS
from services.auth.service.bootstrap import Bootstrapped
from services.auth.settings import AuthSettings, BootstrapSettings, MigrationSettings
from shared import database, runtime
from shared.clock import SystemClock
from shared.errors import TollgateError
from shared.telemetry import configure_logging
from shared.web import Readiness

SCHEMA = "auth"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(operator.users, name="users")
app.add_typer(operator.orgs, name="orgs")
app.add_typer(operator.keys, name="keys")
app.add_typer(operator.signing_keys, name="signing-keys")


@app.callback(invoke_without_command=True)
def serve(context: typer.Context) -> None:
    """Serve until SIGTERM, unless a command is given."""
    if context.invoked_subcommand is None:
        runtime.main("auth", AuthSettings, build)


@app.command()
def migrate() -> None:
    """Make roles and schema, bring the tables to the newest revision, give each role its rights. Idempotent."""
    settings = runtime.load(MigrationSettings)
    migrate_urls(
        settings.database_url.get_secret_value(),
        settings.auth_database_url.get_secret_value(),
        settings.gateway_database_url.get_secret_value(),
    )


def migrate_urls(owner_url: str, auth_url: str, gateway_url: str) -> None:
    """What `migrate` does, for who has the URLs at hand. Raises whatever the database says."""
    database.migrate(SCHEMA, owner_url, auth_url)
    database.set_grants(SCHEMA, owner_url, auth_url, SERVICE_GRANTS)
    database.ensure_role(owner_url, gateway_url)
    database.set_grants(SCHEMA, owner_url, gateway_url, GATEWAY_GRANTS)


@app.command()
def bootstrap(
    username: Annotated[str, typer.Option()],
    email: Annotated[str, typer.Option()],
    key_name: Annotated[str, typer.Option()],
    role: Annotated[Role, typer.Option()] = Role.user,
    scopes: Annotated[str, typer.Option(help="Comma separated; by default what the role usually needs.")] = "",
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="The key's own, as minute=600; repeat. Else the plan's.")
    ] = None,
) -> None:
    """Make a user and an API key, and print them as one JSON line: the only time that the key is shown.

    The password comes from TOLLGATE_BOOTSTRAP_PASSWORD. A user that is there stays as it is and gains the role; an
    earlier key of the same name is revoked.
    """
    settings = runtime.load(BootstrapSettings)
    configure_logging("auth", settings.log_level, sys.stderr)
    wanted = [scope for scope in scopes.split(",") if scope] or DEFAULT_SCOPES[role]
    try:
        username, email, key_name = valid_username(username), valid_email(email), valid_key_name(key_name)
        own = dict(valid_limit(limit) for limit in limits or ())
        made = asyncio.run(_bootstrap(settings, username, email, role, key_name, wanted, own))
    except (TollgateError, ValueError) as e:
        typer.echo(f"bootstrap: {e.message if isinstance(e, TollgateError) else e}", err=True)
        raise typer.Exit(1) from None
    typer.echo(
        json.dumps(
            {
                "user_id": str(made.user_id),
                "org_id": str(made.org_id),
                "key_id": str(made.key_id),
                "key": made.key,
            }
        )
    )


async def _bootstrap(
    settings: BootstrapSettings,
    username: str,
    email: str,
    role: Role,
    key_name: str,
    scopes: Sequence[str],
    limits: Mapping[str, int],
) -> Bootstrapped:
    async with AsyncExitStack() as stack:
        services = await compose(settings, stack, Readiness(), clock=SystemClock(), registry=CollectorRegistry())
        return await services.bootstrap.run(
            username=username,
            email=email,
            password=settings.bootstrap_password.get_secret_value(),
            role=role,
            key_name=key_name,
            scopes=scopes,
            limits=limits,
        )
