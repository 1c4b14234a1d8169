"""The operator's commands. Each prints a table, or with --json one JSON object a line. A secret is printed once, by the
command that makes it, and by no other.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from prometheus_client import CollectorRegistry

from services.auth.app import compose
from services.auth.cli.roles import DEFAULT_SCOPES, Role
from services.auth.domain import ApiKey, UserStatus
from services.auth.domain.fields import valid_email, valid_key_name, valid_username
from services.auth.service import Services
from services.auth.service.installation import on_behalf_of, operator
from services.auth.service.keys import KeyDraft
from services.auth.settings import AuthSettings, BootstrapSettings
from shared import runtime
from shared.clock import SystemClock
from shared.errors import TollgateError
from shared.telemetry import configure_logging
from shared.web import Readiness

users = typer.Typer(no_args_is_help=True, help="People and service accounts.")
orgs = typer.Typer(no_args_is_help=True, help="Organisations.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
signing_keys = typer.Typer(no_args_is_help=True, help="The keys that sign access tokens.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Limit = Annotated[int, typer.Option(min=1, max=1_000, help="At most so many, newest first.")]
Login = Annotated[str, typer.Argument(help="User name or e-mail address.")]
Row = Mapping[str, Any]


@users.command("create")
def create_user(
    username: Annotated[str, typer.Option()],
    email: Annotated[str, typer.Option()],
    role: Annotated[Role, typer.Option()] = Role.user,
    as_json: Json = False,
) -> None:
    """Make a user. The password comes from TOLLGATE_BOOTSTRAP_PASSWORD."""
    settings = runtime.load(BootstrapSettings)

    async def act(services: Services) -> list[Row]:
        account = await services.accounts.register(
            username=valid_username(username),
            email=valid_email(email),
            password=settings.bootstrap_password.get_secret_value(),
            origin=operator().origin,
        )
        roles = await services.installation.set_role(account, role, held=True)
        return [{"id": account.user_id, "username": account.username, "org_id": account.org_id, "roles": roles}]

    _run(act, as_json, settings)


@users.command("list")
def list_users(
    search: Annotated[str, typer.Option(help="How the user name begins; with an @, how the address does.")] = "",
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Everybody, newest first; or those that are searched for."""

    async def act(services: Services) -> list[Row]:
        page = await services.installation.users(search=search, before=None, limit=limit)
        return [
            {"id": u.id, "name": u.name, "kind": u.kind, "email": u.email, "status": u.status, "roles": u.roles}
            for u in page.rows
        ]

    _run(act, as_json)


@users.command("disable")
def disable_user(login: Login, as_json: Json = False) -> None:
    """End a user's sessions and stop their keys, at once."""
    _run(_status(login, UserStatus.DISABLED), as_json)


@users.command("enable")
def enable_user(login: Login, as_json: Json = False) -> None:
    """Undo `disable`: keys work again, sessions do not."""
    _run(_status(login, UserStatus.ACTIVE), as_json)


@users.command("role")
def set_role(
    login: Login,
    role: Annotated[Role, typer.Argument()],
    take: Annotated[bool, typer.Option("--take", help="Take it in place of giving it.")] = False,
    as_json: Json = False,
) -> None:
    """Give a role on the installation, or take it."""

    async def act(services: Services) -> list[Row]:
        account = await services.installation.user(login)
        roles = await services.installation.set_role(account, role, held=not take)
        return [{"id": account.user_id, "username": account.username, "roles": roles}]

    _run(act, as_json)


@users.command("reset-password")
def reset_password(login: Login, as_json: Json = False) -> None:
    """Print a token, this once, that sets a new password: for who cannot get it by e-mail."""

    async def act(services: Services) -> list[Row]:
        account = await services.installation.user(login)
        token = await services.installation.password_token(account)
        return [{"username": account.username, "token": token, "use": "POST /api/v1/auth/password/reset"}]

    _run(act, as_json)


@orgs.command("list")
def list_organizations(limit: Limit = 50, as_json: Json = False) -> None:
    """All organisations, newest first."""

    async def act(services: Services) -> list[Row]:
        page = await services.installation.organizations(before=None, limit=limit)
        return [{"id": o.id, "name": o.name, "plan": o.plan, "personal": o.personal} for o in page.rows]

    _run(act, as_json)


@orgs.command("create")
def create_organization(
    name: Annotated[str, typer.Option()],
    owner: Annotated[str, typer.Option(help="User name or e-mail address.")],
    as_json: Json = False,
) -> None:
    """Make an organisation for a user, who owns it."""

    async def act(services: Services) -> list[Row]:
        account = await services.installation.user(owner)
        actor = on_behalf_of(account)
        made = await services.organizations.create_for(actor, valid_key_name(name))
        return [{"id": made.id, "name": made.name, "owner": account.username}]

    _run(act, as_json)


@keys.command("create")
def create_key(
    user: Annotated[str, typer.Option(help="User name or e-mail address of the owner.")],
    name: Annotated[str, typer.Option()],
    org: Annotated[UUID | None, typer.Option(help="One of the owner's organisations.")] = None,
    scopes: Annotated[str, typer.Option(help="Comma separated; by default what a user's key has.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key and print it: the only time that it is shown."""

    async def act(services: Services) -> list[Row]:
        account = await services.installation.user(user)
        tenant = await services.installation.organization_of(account, org) if org else None
        wanted = tuple(scope for scope in scopes.split(",") if scope) or tuple(DEFAULT_SCOPES[Role.user])
        draft = KeyDraft(name=valid_key_name(name), scopes=wanted)
        new = await services.keys.create(on_behalf_of(account, tenant), draft)
        return [{"id": new.record.id, "name": new.record.name, "key": new.secret}]

    _run(act, as_json)


@keys.command("list")
def list_keys(
    user: Annotated[str, typer.Option(help="User name or e-mail address.")] = "",
    org: Annotated[UUID | None, typer.Option()] = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Keys of a user, of an organisation, or all, newest first; without their secrets, which nobody has."""

    async def act(services: Services) -> list[Row]:
        user_id = (await services.installation.user(user)).user_id if user else None
        found = await services.installation.keys(org_id=org, user_id=user_id, limit=limit)
        return [_key(key, services.clock.now()) for key in found]

    _run(act, as_json)


@keys.command("revoke")
def revoke_key(key_id: Annotated[UUID, typer.Argument()], as_json: Json = False) -> None:
    """Revoke a key, for good, from its next request on."""

    async def act(services: Services) -> list[Row]:
        return [_key(await services.admin.revoke_key(operator(), key_id), services.clock.now())]

    _run(act, as_json)


@signing_keys.command("list")
def list_signing_keys(as_json: Json = False) -> None:
    """Those that are published: which signs, and until when each verifies."""

    async def act(services: Services) -> list[Row]:
        signing = services.signing_keys.signing().kid
        return [
            {"kid": k.kid, "signs": k.kid == signing, "signs_from": k.signs_from, "retires_at": k.retires_at}
            for k in services.signing_keys.published()
        ]

    _run(act, as_json)


@signing_keys.command("rotate")
def rotate_signing_keys(
    at_once: Annotated[bool, typer.Option("--at-once", help="The key may be copied: refuse its tokens.")] = False,
    as_json: Json = False,
) -> None:
    """Make the next signing key. Nobody is logged out; with --at-once everybody's client refreshes."""

    async def act(services: Services) -> list[Row]:
        return [{"kid": await services.signing_keys.rotate(at_once=at_once)}]

    _run(act, as_json)


def _status(login: str, status: UserStatus) -> Callable[[Services], Awaitable[list[Row]]]:
    async def act(services: Services) -> list[Row]:
        account = await services.installation.user(login)
        now = await services.admin.set_user_status(operator(), account.user_id, status)
        return [{"id": account.user_id, "username": account.username, "status": now}]

    return act


def _key(key: ApiKey, now: datetime) -> Row:
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "status": key.state_at(now),
        "org_id": key.org_id,
        "user_id": key.user_id,
        "scopes": key.scopes,
        "last_used_at": key.last_used_at,
    }


def _run(
    act: Callable[[Services], Awaitable[Sequence[Row]]], as_json: bool, settings: AuthSettings | None = None
) -> None:
    chosen = settings or runtime.load(AuthSettings)
    configure_logging("auth", chosen.log_level, sys.stderr)

    async def main() -> Sequence[Row]:
        async with AsyncExitStack() as stack:
            services = await compose(chosen, stack, Readiness(), clock=SystemClock(), registry=CollectorRegistry())
            return await act(services)

    try:
        rows = asyncio.run(main())
    except (TollgateError, ValueError) as e:
        typer.echo(e.message if isinstance(e, TollgateError) else str(e), err=True)
        raise typer.Exit(1) from None
    for line in map(_json, rows) if as_json else _table(rows):
        typer.echo(line)


def _json(row: Row) -> str:
    return json.dumps({name: list(v) if isinstance(v, tuple) else v for name, v in row.items()}, default=str)


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = list(rows[0])
    cells = [[_cell(row[name]) for name in head] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(head)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [[name.upper() for name in head], *cells]
    ]


def _cell(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "-" if value is None else str(value)
