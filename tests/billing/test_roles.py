"""What was written once stays: the service's role may not change it, and triggers stop the owner too."""

from __future__ import annotations

from uuid import UUID

import asyncpg
import pytest

from services.billing.tables import APPEND_ONLY, tables
from tests.billing.harness import Ledger, owner, settle

ALWAYS_THERE = ("wallet", "account", "price", "topup")
NOT_ALLOWED = (
    "UPDATE billing.wallet SET id = id",
    "UPDATE billing.wallet SET created_at = now()",
    "UPDATE billing.account SET kind = 'funding'",
    "UPDATE billing.account SET limited = false",
    "UPDATE billing.price SET output = 0",
    "UPDATE billing.topup SET amount = 1",
    "ALTER TABLE billing.transfer DISABLE TRIGGER ALL",
    "DROP TABLE billing.transfer",
    "CREATE TABLE billing.mine (id int)",
    "SET session_replication_role = 'replica'",
)
BROKEN_BOOKS = (
    (
        "UPDATE billing.account SET debits_posted = debits_posted - 1 WHERE kind = 'funding'",
        asyncpg.RestrictViolationError,
    ),
    ("UPDATE billing.account SET debits_posted = credits_posted + 1 WHERE limited", asyncpg.CheckViolationError),
    ("UPDATE billing.account SET debits_pending = credits_posted + 1 WHERE limited", asyncpg.CheckViolationError),
    ("UPDATE billing.account SET debits_pending = -1", asyncpg.CheckViolationError),
    ("UPDATE billing.price SET validity = tstzrange(lower(validity), now() - interval '1 d')", asyncpg.PostgresError),
)


@pytest.fixture
async def used(ledger: Ledger, org_id: UUID) -> UUID:
    """A wallet with a row in every append-only table."""
    held = await ledger.held(org_id, 10)
    await ledger.writer.submit(settle(org_id, held.hold_id, 5))
    return org_id


@pytest.mark.parametrize("table", [*APPEND_ONLY, *ALWAYS_THERE])
@pytest.mark.parametrize("change", ["DELETE FROM billing.{}", "TRUNCATE billing.{} CASCADE"])
async def test_the_services_role_removes_nothing(ledger: Ledger, used: UUID, table: str, change: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ledger.pool.execute(change.format(table))


@pytest.mark.parametrize("table", APPEND_ONLY)
async def test_the_services_role_changes_nothing_that_is_append_only(ledger: Ledger, used: UUID, table: str) -> None:
    column = list(tables.tables[f"billing.{table}"].columns)[-1].name
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ledger.pool.execute(f"UPDATE billing.{table} SET {column} = {column}")


@pytest.mark.parametrize("statement", NOT_ALLOWED)
async def test_the_services_role_has_no_way_around(ledger: Ledger, used: UUID, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ledger.pool.execute(statement)


@pytest.mark.parametrize("table", APPEND_ONLY)
@pytest.mark.parametrize(
    "change", ["UPDATE billing.{0} SET {1} = {1}", "DELETE FROM billing.{0}", "TRUNCATE billing.{0} CASCADE"]
)
async def test_triggers_stop_the_owner_too(ledger: Ledger, used: UUID, table: str, change: str) -> None:
    column = list(tables.tables[f"billing.{table}"].columns)[-1].name
    connection = await owner(ledger.owner_url)
    try:
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(change.format(table, column))
    finally:
        await connection.close()


@pytest.mark.parametrize(("statement", "error"), BROKEN_BOOKS)
async def test_books_that_do_not_balance_cannot_be_written(
    ledger: Ledger, used: UUID, statement: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await ledger.pool.execute(statement)


async def test_a_hold_has_one_resolution_by_its_primary_key(ledger: Ledger, used: UUID) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await ledger.pool.execute(
            """INSERT INTO billing.hold_resolution (hold_id, op_id, kind, amount, resolved_at)
            SELECT hold_id, op_id, 'void', 0, now() FROM billing.hold_resolution LIMIT 1"""
        )


async def test_a_number_within_a_wallet_belongs_to_one_transfer(ledger: Ledger, used: UUID) -> None:
    """Writers that did not wait for each other would become an error, not a fork of the history."""
    with pytest.raises(asyncpg.UniqueViolationError, match="uq_transfer_wallet_id_wallet_seq"):
        await ledger.pool.execute(
            """INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount,
                code, balance_after, effective_at, booked_at)
            SELECT uuidv7(), op_id, wallet_id, wallet_seq, debit_account, credit_account, amount,
                code, balance_after, effective_at, booked_at FROM billing.transfer WHERE wallet_id = $1 LIMIT 1""",
            used,
        )
