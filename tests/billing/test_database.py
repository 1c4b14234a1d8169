"""What PostgreSQL says when it will be better in a moment is tried again; the books never see it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from services.billing.repository.database import Connection
from tests.billing.harness import Ledger, owner, settle

# A sequence is not rolled back: the trigger knows which attempt it sees.
FAULT = """
    CREATE SEQUENCE billing.attempts;
    CREATE FUNCTION billing.fault() RETURNS trigger SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('billing.attempts') < 3 THEN RAISE 'fault' USING ERRCODE = '{code}'; END IF; RETURN NEW;
    END $$;
    CREATE TRIGGER fault BEFORE INSERT ON billing.usage FOR EACH ROW EXECUTE FUNCTION billing.fault()"""
REPAIR = "DROP FUNCTION billing.fault CASCADE; DROP SEQUENCE billing.attempts"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("53100", id="disk full"),
        pytest.param("53200", id="out of memory"),
        pytest.param("25006", id="read only"),
    ],
)
async def test_an_operation_outlasts_a_server_that_cannot_write_for_a_moment(
    ledger: Ledger, org_id: UUID, code: str
) -> None:
    held = await ledger.held(org_id, 100)
    connection = await owner(ledger.owner_url)
    await connection.execute(FAULT.format(code=code))
    try:
        await ledger.writer.submit(settle(org_id, held.hold_id, 40))
    finally:
        await connection.execute(REPAIR)
        await connection.close()
    assert (await ledger.wallet(org_id)).spent == 40
    await ledger.verified()


async def test_a_prepared_statement_outlasts_a_migration(ledger: Ledger) -> None:
    async def read(connection: Connection) -> list[Any]:
        return list(await connection.fetchrow("SELECT * FROM billing.migrated"))

    connection = await owner(ledger.owner_url)
    await connection.execute(
        "CREATE TABLE billing.migrated AS SELECT 1 AS a; GRANT SELECT ON billing.migrated TO PUBLIC"
    )
    try:
        assert await ledger.database.transaction(read) == [1]
        await connection.execute("ALTER TABLE billing.migrated ADD COLUMN b int DEFAULT 2")
        assert await ledger.database.transaction(read) == [1, 2]
    finally:
        await connection.execute("DROP TABLE billing.migrated")
        await connection.close()
