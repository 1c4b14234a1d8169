"""A wallet's past: the balance as of any time, filters, and exports that go as fast as they are read."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import uvicorn

from services.billing.errors import TooManyExports
from services.billing.repository import history as repository
from services.billing.repository.history import TransactionFilter
from services.billing.service import History
from services.billing.service import history as history_service
from shared.clock import SystemClock
from tests.billing.harness import (
    MODEL,
    SIGNUP_NANO,
    App,
    Ledger,
    grant,
    operator,
    person,
    place,
    settle,
    signed,
    wait_until,
)

TRANSACTIONS = "/api/v1/billing/transactions"
EXPORT = f"{TRANSACTIONS}/export"
BALANCE = "/api/v1/billing/wallet/balance"
MANY = 12_000


async def spend(ledger: Ledger, org_id: UUID, *tokens: int, **changes: Any) -> None:
    for n in tokens:
        placed = place(org_id, n, **changes)
        await ledger.writer.submit(placed)
        await ledger.writer.submit(settle(org_id, placed.hold_id, n))


async def lengthen(ledger: Ledger, org_id: UUID, transfers: int) -> None:
    """A long history, by hand: the last transfer again and again, one second later each, from two hours ago on."""
    await ledger.writer.submit(grant(org_id, 5))
    await ledger.pool.execute(
        """INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount,
            code, balance_after, effective_at, booked_at)
        SELECT gen_random_uuid(), t.op_id, t.wallet_id, t.wallet_seq + n, t.debit_account, t.credit_account, 1,
            'grant', t.balance_after + n, t.effective_at, t.booked_at + n * interval '1 second'
        FROM billing.transfer t, generate_series(1, $2::int8) n
        WHERE t.wallet_id = $1 AND t.wallet_seq = (SELECT seq FROM billing.wallet WHERE id = $1)""",
        org_id,
        transfers,
    )
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq + $2 WHERE id = $1", org_id, transfers)


async def transfers(ledger: Ledger, org_id: UUID) -> list[Any]:
    found: list[Any] = await ledger.pool.fetch(
        "SELECT * FROM billing.transfer WHERE wallet_id = $1 ORDER BY wallet_seq", org_id
    )
    return found


async def test_the_balance_as_of_any_time_is_that_of_the_replay(app: App, ledger: Ledger, org_id: UUID) -> None:
    await spend(ledger, org_id, *range(1, 20))
    rows, headers = await transfers(ledger, org_id), signed(person(org_id))
    moments = {moment for row in rows for moment in _around(row["booked_at"])}
    for moment in sorted(moments):
        answer = (await app.http.get(BALANCE, params={"at": moment.isoformat()}, headers=headers)).json()
        replayed = [row for row in rows if row["booked_at"] <= moment]
        assert answer["number"] == len(replayed)
        expected = SIGNUP_NANO - sum(row["amount"] for row in replayed[1:]) if replayed else 0
        assert float(answer["balance"]) == pytest.approx(expected / 10**9, abs=1e-12)
    now = (await app.http.get(BALANCE, headers=headers)).json()
    assert (now["balance"], now["number"]) == ("0.00000081", len(rows))


def _around(moment: datetime) -> list[datetime]:
    tick = timedelta(microseconds=1)
    return [moment - tick, moment, moment + tick]


async def test_there_is_no_balance_of_the_future_and_none_before_the_wallet(app: App, org_id: UUID) -> None:
    headers = signed(person(org_id))
    future = {"at": (datetime.now(UTC) + timedelta(minutes=5)).isoformat()}
    refused = await app.http.get(BALANCE, params=future, headers=headers)
    assert (refused.status_code, refused.json()["param"]) == (400, "at")
    assert (await app.http.get(BALANCE, headers=headers)).json()["balance"] == "0.00"


async def test_transactions_are_filtered_by_key_member_and_model(app: App, ledger: Ledger, org_id: UUID) -> None:
    ada, bob, key = uuid4(), uuid4(), uuid4()
    await spend(ledger, org_id, 1, 2, user_id=ada)
    await spend(ledger, org_id, 3, user_id=bob, key_id=key)
    headers = signed(person(org_id))

    async def amounts(**query: Any) -> list[str]:
        answer = await app.http.get(TRANSACTIONS, params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        return [t["amount"] for t in answer.json()["data"]]

    assert await amounts(user_id=ada) == ["-0.000000002", "-0.000000001"]
    assert await amounts(key_id=key) == ["-0.000000003"]
    assert len(await amounts(model=MODEL)) == 3
    assert await amounts(model="other") == []
    assert await amounts(key_id=key, kind="grant") == []


async def test_a_filter_that_few_pass_still_reaches_them_in_bounded_pages(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await spend(ledger, org_id, 7)
    await lengthen(ledger, org_id, 100)
    monkeypatch.setattr(history_service, "SCANNED_MAX", 30)
    history, found, before, pages = History(ledger.database, SystemClock(), exports_max=1), [], None, 0
    while True:
        rows, before = await history.transactions(
            org_id, TransactionFilter(("usage",)), before_seq=before, since=None, until=None, limit=5
        )
        found += [row.amount for row in rows]
        pages += 1
        if before is None:
            break
    assert (found, pages) == ([7], 4)


async def test_a_time_that_few_transactions_lie_in_is_found_in_a_long_history(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    await lengthen(ledger, org_id, MANY)
    rows = await transfers(ledger, org_id)
    since, until = rows[5_000]["booked_at"], rows[5_003]["booked_at"]
    query = {"from": since.isoformat(), "to": until.isoformat()}
    page = (await app.http.get(TRANSACTIONS, params=query, headers=signed(person(org_id)))).json()
    assert [t["number"] for t in page["data"]] == [5_003, 5_002, 5_001]
    assert page["next_cursor"] is None


@pytest.mark.parametrize("form", ["csv", "ndjson"])
async def test_an_export_is_the_whole_history_in_order(app: App, ledger: Ledger, org_id: UUID, form: str) -> None:
    await spend(ledger, org_id, *range(1, 5))
    await ledger.writer.submit(grant(org_id, 5, reason='=1+1, "quoted"'))
    answer = await app.http.get(EXPORT, params={"format": form}, headers=signed(person(org_id)))
    assert answer.status_code == 200
    if form == "csv":
        assert answer.headers["content-type"].startswith("text/csv")
        found: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(answer.text)))
        assert found[-1]["reason"] == '\'=1+1, "quoted"'
    else:
        assert answer.headers["content-type"] == "application/x-ndjson"
        found = [json.loads(line) for line in answer.text.splitlines()]
        assert found[-1]["reason"] == '=1+1, "quoted"'
    assert [int(row["number"]) for row in found] == list(range(1, 7))
    assert [row["kind"] for row in found] == ["grant", *["usage"] * 4, "grant"]
    balance = 0
    for row in found:
        balance += round(float(row["amount"]) * 10**9)
        assert row["balance_after"] == f"{balance / 10**9:.9f}".rstrip("0")


async def test_an_export_covers_every_piece_once(ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    await lengthen(ledger, org_id, 100)
    monkeypatch.setattr(history_service, "EXPORT_PAGE", 7)
    monkeypatch.setattr(history_service, "SCANNED_MAX", 10)
    history = History(ledger.database, SystemClock(), exports_max=1)
    pieces = await history.export(org_id, TransactionFilter(), since=None, until=None)
    assert [row.seq for rows in [p async for p in pieces] for row in rows] == list(range(1, 102))


async def test_exports_are_bounded(ledger: Ledger, org_id: UUID) -> None:
    history = History(ledger.database, SystemClock(), exports_max=1)
    await ledger.writer.submit(grant(org_id, 1))
    first: Any = await history.export(org_id, TransactionFilter(), since=None, until=None)
    await anext(first)
    with pytest.raises(TooManyExports):
        await history.export(org_id, TransactionFilter(), since=None, until=None)
    await first.aclose()
    await history.export(org_id, TransactionFilter(), since=None, until=None)


@asynccontextmanager
async def served(app: App) -> AsyncIterator[int]:
    """The application behind a real socket; its port."""
    transport = app.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    server = uvicorn.Server(uvicorn.Config(transport.app, lifespan="off", log_config=None, ws="none"))
    serving = asyncio.create_task(server._serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def test_an_export_waits_for_a_slow_reader_and_ends_with_one_that_left(
    app: App, ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lengthen(ledger, org_id, MANY)
    fetched = 0
    original = repository.transactions

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal fetched
        fetched += 1
        return await original(*arguments, **options)

    monkeypatch.setattr(repository, "transactions", counted)
    pieces_in_all = MANY // history_service.EXPORT_PAGE + 1
    async with served(app) as port:
        for leaves in (False, True):
            fetched = 0
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, ("127.0.0.1", port))
            identity = "".join(f"{k}: {v}\r\n" for k, v in signed(person(org_id)).items())
            request = f"GET {EXPORT}?format=ndjson HTTP/1.1\r\nhost: billing\r\nconnection: close\r\n{identity}\r\n"
            await loop.sock_sendall(raw, request.encode())
            received = await loop.sock_recv(raw, 1_024)
            assert b" 200 " in received
            seen = -1
            while seen != fetched:  # until it fetches no more by itself
                seen = fetched
                await asyncio.sleep(0.3)
            assert fetched < pieces_in_all
            if leaves:
                raw.close()
                await wait_until(lambda: _exports(app, 0), "the end of the export")
                assert fetched < pieces_in_all
                continue
            while piece := await loop.sock_recv(raw, 65_536):
                received += piece
            raw.close()
            assert received.count(b'"number"') == MANY + 1


async def _exports(app: App, expected: int) -> bool:
    transport = app.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    found: History = transport.app.state.history  # type: ignore[attr-defined]
    return found._exports == expected


async def test_operators_look_at_any_wallet_and_customers_do_not(app: App, ledger: Ledger, org_id: UUID) -> None:
    await spend(ledger, org_id, 5)
    base = f"/api/v1/admin/billing/wallets/{org_id}"
    for path in ("", "/balance", "/transactions"):
        assert (await app.http.get(base + path, headers=signed(operator()))).status_code == 200
        refused = await app.http.get(base + path, headers=signed(person(org_id, scopes=("*",))))
        assert refused.status_code == 403
    unknown = await app.http.get(f"/api/v1/admin/billing/wallets/{uuid4()}", headers=signed(operator()))
    assert (unknown.status_code, unknown.json()["code"]) == (404, "wallet_not_found")


async def test_grants_are_listed_in_the_order_of_their_draw(app: App, ledger: Ledger, org_id: UUID) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    await ledger.writer.submit(grant(org_id, 10, reason="for ever"))
    await ledger.writer.submit(grant(org_id, 20, reason="soon", expires_at=soon))
    await ledger.held(org_id, 25)
    data = (await app.http.get("/api/v1/billing/grants", headers=signed(person(org_id)))).json()["data"]
    assert [(g["reason"], g["left"], g["held"]) for g in data] == [
        ("soon", "0.00000002", "0.00000002"),
        ("for ever", "0.00000001", "0.000000005"),
    ]
    assert datetime.fromisoformat(data[0]["expires_at"]) == soon
