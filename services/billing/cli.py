"""The command line: `python -m services.billing [migrate | prices | verify | show]`; without a command it serves."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from services.billing.app import build
from services.billing.collector import collect_seldom
from services.billing.price_file import PriceFileError, read_prices
from services.billing.repository import audit
from services.billing.repository.database import Database, DatabaseLimits
from services.billing.repository.verification import Report
from services.billing.repository.verification import verify as verify_ledger
from services.billing.service import Prices
from services.billing.settings import BillingSettings, DatabaseSettings, MigrationSettings
from services.billing.tables import SERVICE_GRANTS
from shared import database, runtime
from shared.errors import TollgateError

SCHEMA = "billing"
PROGRESS_INTERVAL_S = 2.0
PUBLISHED_BY = "cli"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback(invoke_without_command=True)
def serve(context: typer.Context) -> None:
    """Serve until SIGTERM, unless a command is given."""
    if context.invoked_subcommand is None:
        collect_seldom()
        runtime.main("billing", BillingSettings, build)


@app.command()
def migrate() -> None:
    """Make role and schema, bring the tables to the newest revision, give the role its rights. Idempotent."""
    settings = runtime.load(MigrationSettings)
    migrate_urls(settings.database_url.get_secret_value(), settings.billing_database_url.get_secret_value())


def migrate_urls(owner_url: str, billing_url: str) -> None:
    """What `migrate` does, for who has the URLs at hand. Raises whatever the database says."""
    database.migrate(SCHEMA, owner_url, billing_url)
    database.set_grants(SCHEMA, owner_url, billing_url, SERVICE_GRANTS)


@app.command()
def prices(
    file: Annotated[Path, typer.Option(exists=True, dir_okay=False, readable=True, help="TOML with [[price]] tables.")],
) -> None:
    """Publish list prices, effective now. A price that says what is in force already is left alone."""
    settings = runtime.load(DatabaseSettings)
    try:
        asyncio.run(_publish(settings.billing_database_url.get_secret_value(), file))
    except (PriceFileError, TollgateError) as e:
        typer.echo(f"prices: {e.message if isinstance(e, TollgateError) else e}", err=True)
        raise typer.Exit(1) from None


async def _publish(url: str, file: Path) -> None:
    wanted = read_prices(file)
    async with Database(url, DatabaseLimits(connections_max=2)) as database:
        service = Prices(database)
        for model, customer_class, terms in wanted:
            published = await service.bring_up_to_date(model, customer_class, terms, PUBLISHED_BY)
            typer.echo(f"{model} ({customer_class}): {'unchanged' if published is None else 'published'}")


@app.command()
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    wallet: Annotated[UUID | None, typer.Option(help="Only this organisation's transfers and accounts.")] = None,
) -> None:
    """Replay every wallet and compare. Exits 1 when anything differs; changes nothing."""
    url = runtime.load(DatabaseSettings).billing_database_url.get_secret_value()
    report = asyncio.run(verify_ledger(url, _Progress()) if wallet is None else audit.wallet(url, wallet))
    for line in [json.dumps(report.as_json())] if as_json else report.lines():
        typer.echo(line)
    if not report.is_clean:
        raise typer.Exit(1)


@app.command()
def show(hold_id: Annotated[UUID, typer.Argument(help="The hold_id of a transaction.")]) -> None:
    """Print all that is known of one request, in nano-credits, as JSON. Exits 1 when it does not add up, 2 for none."""
    found = asyncio.run(audit.request(runtime.load(DatabaseSettings).billing_database_url.get_secret_value(), hold_id))
    if found is None:
        typer.echo("show: there is no such hold", err=True)
        raise typer.Exit(2)
    request, differences = found
    typer.echo(json.dumps({**request, "differences": [f"{d.check}: {d.detail}" for d in differences]}, indent=2))
    if differences:
        raise typer.Exit(1)


class _Progress:
    """A line on standard error every PROGRESS_INTERVAL_S, so none for what is quick."""

    def __init__(self) -> None:
        self._said_at_s = time.monotonic()

    def __call__(self, report: Report) -> None:
        if time.monotonic() - self._said_at_s >= PROGRESS_INTERVAL_S:
            self._said_at_s = time.monotonic()
            typer.echo(f"verify: {report.progress()} so far", err=True)
