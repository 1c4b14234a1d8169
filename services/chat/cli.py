"""The command line: `python -m services.chat [migrate]`; without a command it serves."""

from __future__ import annotations

import typer

from services.chat.app import build
from services.chat.settings import ChatSettings, MigrationSettings
from services.chat.tables import SERVICE_GRANTS
from shared import database, runtime

SCHEMA = "chat"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback(invoke_without_command=True)
def serve(context: typer.Context) -> None:
    """Serve until SIGTERM, unless a command is given."""
    if context.invoked_subcommand is None:
        runtime.main("chat", ChatSettings, build)


@app.command()
def migrate() -> None:
    """Make role and schema, bring the tables to the newest revision, give the role its rights. Idempotent."""
    settings = runtime.load(MigrationSettings)
    migrate_urls(settings.database_url.get_secret_value(), settings.chat_database_url.get_secret_value())


def migrate_urls(owner_url: str, chat_url: str) -> None:
    """What `migrate` does, for who has the URLs at hand. Raises whatever the database says."""
    database.migrate(SCHEMA, owner_url, chat_url)
    database.set_grants(SCHEMA, owner_url, chat_url, SERVICE_GRANTS)
