"""Webhooks: what they tell of, signed as the standard's own library reads it, again until they arrive, and nowhere
that a customer must not reach through us.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import SecretStr
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from services.billing.errors import UnsafeDestination
from services.billing.repository import webhooks as repository
from services.billing.webhooks.destination import PublicResolver, check_url, is_public
from services.billing.webhooks.sender import WebhookSender
from shared.identity import Identity
from shared.ids import uuid7
from tests.billing.harness import IDENTITY_KEYS, App, Ledger, grant, person, running, settle, signed, wait_until

WEBHOOKS = "/api/v1/billing/webhooks"
ALERTS = "/api/v1/billing/alerts"


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


def owner(org_id: UUID) -> Identity:
    return Identity(kind="user", org_id=str(org_id), user_id=str(uuid4()), scopes=("billing:read", "billing:write"))


@dataclass
class Receiver:
    """A customer's server. `answers` are the statuses of the next requests; then 204."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], str]] = field(default_factory=list)
    hang: bool = False

    async def receive(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.text()))
        if self.hang:
            await asyncio.sleep(3_600)
        status = self.answers.pop(0) if self.answers else 204
        return web.Response(status=status, headers={"location": self.url} if status == 302 else {})

    async def count(self, expected: int) -> bool:
        return len(self.received) >= expected


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver, server = Receiver(), web.Application()
    server.router.add_post("/hook", receiver.receive)
    runner = web.AppRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.url = "http://{}:{}/hook".format(*runner.addresses[0][:2])
        yield receiver
    finally:
        await runner.cleanup()


@pytest_asyncio.fixture(loop_scope="session")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@asynccontextmanager
async def delivering(owner_url: str, timeout_s: float) -> AsyncIterator[App]:
    """The service with webhooks, in a network of its own, delivering."""
    async with running(
        owner_url,
        signup_credits="0.000001",
        billing_secret_keys=SecretStr(IDENTITY_KEYS),
        billing_webhook_private=True,
        billing_webhook_timeout_s=timeout_s,
        billing_webhook_retries_s=(0.05, 0.05, 0.05),
        billing_webhook_interval_s=0.02,
        billing_alert_interval_s=0.02,
    ) as app:
        loops = [asyncio.create_task(app.tasks[name]()) for name in ("alerts", "webhooks")]
        yield app
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(owner_url: str, ledger: Ledger) -> AsyncIterator[App]:
    async with delivering(owner_url, timeout_s=30) as app:
        yield app


async def added(service: App, who: Identity, receiver: Receiver) -> dict[str, Any]:
    answer = await service.http.post(WEBHOOKS, json={"url": receiver.url}, headers=signed(who, **key()))
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def sent_a_test(service: App, who: Identity, webhook_id: str) -> str:
    answer = await service.http.post(f"{WEBHOOKS}/{webhook_id}/test", headers=signed(who, **key()))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["event_id"])


async def deliveries(service: App, who: Identity, webhook_id: str) -> list[dict[str, Any]]:
    answer = await service.http.get(f"{WEBHOOKS}/{webhook_id}/deliveries", headers=signed(who))
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_a_low_balance_is_told_once_in_a_message_that_the_standards_library_verifies(
    service: App, ledger: Ledger, receiver: Receiver, org_id: UUID
) -> None:
    who = owner(org_id)
    await service.http.get("/api/v1/billing/wallet", headers=signed(who))  # with 1,000 nano-credits
    hook = await added(service, who, receiver)
    body = {"below": ["0.0000005", "0.0000001"]}
    set_ = await service.http.put(ALERTS, json=body, headers=signed(who, **key()))
    assert set_.json() == {"data": [{"below": t, "is_below": False} for t in ("0.0000005", "0.0000001")]}

    held = await ledger.held(org_id, 600)
    await ledger.writer.submit(settle(org_id, held.hold_id, 600))
    await wait_until(lambda: receiver.count(1), "the message")
    headers, text = receiver.received[0]
    message = Webhook(hook["secret"]).verify(text, headers)
    assert message["type"] == "wallet.balance_low"
    assert message["data"] == {"org_id": str(org_id), "threshold": "0.0000005", "balance": "0.0000004"}
    with pytest.raises(WebhookVerificationError):
        Webhook(hook["secret"]).verify(text + " ", headers)

    await ledger.writer.submit(grant(org_id, 500))

    async def armed_again() -> bool:
        alerts = (await service.http.get(ALERTS, headers=signed(who))).json()["data"]
        return [alert["is_below"] for alert in alerts] == [False, False]

    await wait_until(armed_again, "the end of the alert above its threshold")
    held = await ledger.held(org_id, 850)
    await ledger.writer.submit(settle(org_id, held.hold_id, 850))
    await wait_until(lambda: receiver.count(3), "two more messages")
    said = [Webhook(hook["secret"]).verify(text, headers)["data"]["threshold"] for headers, text in receiver.received]
    assert sorted(said[1:]) == ["0.0000001", "0.0000005"]
    now = (await service.http.get(ALERTS, headers=signed(who))).json()["data"]
    assert [alert["is_below"] for alert in now] == [True, True]


async def test_a_message_comes_again_with_the_same_id_until_it_is_taken(
    service: App, receiver: Receiver, org_id: UUID
) -> None:
    who = owner(org_id)
    hook = await added(service, who, receiver)
    receiver.answers = [500, 302, 429]
    event_id = await sent_a_test(service, who, hook["id"])
    await wait_until(lambda: receiver.count(4), "the fourth attempt")
    assert {headers["webhook-id"] for headers, _ in receiver.received} == {f"msg_{UUID(event_id).hex}"}
    for headers, text in receiver.received:
        assert Webhook(hook["secret"]).verify(text, headers)["type"] == "webhook.test"

    async def delivered() -> bool:
        return [d["status"] for d in await deliveries(service, who, hook["id"])] == ["delivered"]

    await wait_until(delivered, "the delivery")
    assert len(receiver.received) == 4, "a redirect is not followed, and what was taken is not sent again"


async def test_a_receiver_that_never_answers_properly_is_given_up(
    lonely_url: str, receiver: Receiver, org_id: UUID
) -> None:
    who = owner(org_id)
    async with delivering(lonely_url, timeout_s=0.5) as service:
        hook = await added(service, who, receiver)
        receiver.hang = True
        await sent_a_test(service, who, hook["id"])

        async def failed() -> bool:
            return [d["status"] for d in await deliveries(service, who, hook["id"])] == ["failed"]

        await wait_until(failed, "the end of the attempts")
        [delivery] = await deliveries(service, who, hook["id"])
    assert (delivery["attempts"], delivery["response_status"], delivery["error"]) == (4, None, "TimeoutError")


async def test_a_receiver_that_is_gone_gets_nothing_more_until_it_is_enabled(
    service: App, receiver: Receiver, org_id: UUID
) -> None:
    who = owner(org_id)
    hook = await added(service, who, receiver)
    receiver.answers = [410]
    await sent_a_test(service, who, hook["id"])

    async def disabled() -> bool:
        [found] = (await service.http.get(WEBHOOKS, headers=signed(who))).json()["data"]
        return found["disabled_reason"] is not None

    await wait_until(disabled, "the end of deliveries")
    assert [d["status"] for d in await deliveries(service, who, hook["id"])] == ["failed"]
    test = await service.http.post(f"{WEBHOOKS}/{hook['id']}/test", headers=signed(who, **key()))
    assert (test.status_code, test.json()["code"]) == (409, "webhook_disabled")
    enabled = await service.http.post(f"{WEBHOOKS}/{hook['id']}/enable", headers=signed(who, **key()))
    assert enabled.status_code == 204
    await sent_a_test(service, who, hook["id"])
    await wait_until(lambda: receiver.count(2), "the next message")


async def test_old_events_are_forgotten_with_their_deliveries(ledger: Ledger, org_id: UUID) -> None:
    old, new = uuid7(1_600_000_000_000), uuid7()
    for event_id in (old, new):
        await ledger.pool.execute(
            """INSERT INTO billing.webhook_event (id, wallet_id, type, body, created_at)
            VALUES ($1, $2, 'webhook.test', '{}', now())""",
            event_id,
            org_id,
        )
    assert await repository.forget(ledger.database, uuid7(1_700_000_000_000), 10) == 1
    left = await ledger.pool.fetch("SELECT id FROM billing.webhook_event WHERE wallet_id = $1", org_id)
    assert [row[0] for row in left] == [new]


async def test_a_process_that_dies_in_the_middle_of_an_attempt_loses_no_message(
    service: App, ledger: Ledger, receiver: Receiver, org_id: UUID
) -> None:
    """A lease that nobody answers for is over after its time."""
    who = owner(org_id)
    hook = await added(service, who, receiver)
    event_id = uuid4()
    await ledger.pool.execute(
        """WITH event AS (
            INSERT INTO billing.webhook_event (id, wallet_id, type, body, created_at)
            VALUES ($1, $2, 'webhook.test', '{}', now()) RETURNING id)
        INSERT INTO billing.webhook_delivery (event_id, endpoint_id, status, attempts, due_at, updated_at)
        SELECT id, $3, 'pending', 1, now() + interval '0.5 s', now() FROM event""",
        event_id,
        org_id,
        UUID(hook["id"]),
    )
    await wait_until(lambda: receiver.count(1), "another's attempt")
    Webhook(hook["secret"]).verify(receiver.received[0][1], receiver.received[0][0], json_parse=False)


async def test_a_rotated_secret_and_the_one_before_both_verify(service: App, receiver: Receiver, org_id: UUID) -> None:
    who = owner(org_id)
    old, headers = await added(service, who, receiver), signed(who, **key())
    new = (await service.http.post(f"{WEBHOOKS}/{old['id']}/rotate", headers=headers)).json()
    again = (await service.http.post(f"{WEBHOOKS}/{old['id']}/rotate", headers=headers)).json()
    assert new["secret"] == again["secret"] != old["secret"]
    await sent_a_test(service, who, old["id"])
    await wait_until(lambda: receiver.count(1), "the message")
    sent, text = receiver.received[0]
    for secret in (old["secret"], new["secret"]):
        Webhook(secret).verify(text, sent)


async def test_a_removed_webhook_gets_nothing_and_its_number_is_bounded(
    service: App, receiver: Receiver, org_id: UUID
) -> None:
    who = owner(org_id)
    hooks = [await added(service, who, receiver) for _ in range(10)]
    full = await service.http.post(WEBHOOKS, json={"url": receiver.url}, headers=signed(who, **key()))
    assert (full.status_code, full.json()["code"]) == (409, "too_many_webhooks")
    for hook in hooks:
        gone = await service.http.delete(f"{WEBHOOKS}/{hook['id']}", headers=signed(who, **key()))
        assert gone.status_code == 204
    assert (await service.http.get(WEBHOOKS, headers=signed(who))).json() == {"data": []}
    unknown = await service.http.post(f"{WEBHOOKS}/{hooks[0]['id']}/test", headers=signed(who, **key()))
    assert (unknown.status_code, unknown.json()["code"]) == (404, "webhook_not_found")


async def test_webhooks_are_the_organisations_own(service: App, receiver: Receiver, org_id: UUID) -> None:
    hook = await added(service, owner(org_id), receiver)
    stranger = owner(uuid4())
    for method, path in (
        ("POST", "/rotate"),
        ("POST", "/test"),
        ("POST", "/enable"),
        ("DELETE", ""),
        ("GET", "/deliveries"),
    ):
        answer = await service.http.request(method, f"{WEBHOOKS}/{hook['id']}{path}", headers=signed(stranger, **key()))
        assert answer.status_code == 404, path
    reader = await service.http.post(WEBHOOKS, json={"url": receiver.url}, headers=signed(person(org_id), **key()))
    assert reader.status_code == 403


async def test_without_keys_there_are_no_webhooks(app: App, org_id: UUID) -> None:
    body = {"url": "https://example.com/hook"}
    answer = await app.http.post(WEBHOOKS, json=body, headers=signed(owner(org_id), **key()))
    assert (answer.status_code, answer.json()["code"]) == (404, "webhooks_not_offered")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "ftp://example.com/",
        "https://",
        "https:///hook",
        "https://user:pw@example.com/",
        "https://example.com/#part",
        "https://example.com:22/",
        "https://example.com:99999/",
        "https://127.0.0.1/",
        "https://10.1.2.3/",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:a00:1::]/",
        "https://[fe80::1]/",
        "https://[fc00::1]/",
        "https://[fec0::1]/",
        "https://exam ple.com/",
        "https://example.com/" + "x" * 2_000,
    ],
)
def test_addresses_that_are_not_public_https_are_refused(url: str) -> None:
    with pytest.raises(UnsafeDestination):
        check_url(url, private=False)


@pytest.mark.parametrize("url", ["https://example.com/a?b=c", "https://example.com:8443/", "https://1.1.1.1/"])
def test_public_addresses_are_accepted(url: str) -> None:
    check_url(url, private=False)


@dataclass
class Names(AbstractResolver):
    """What a hostile name server answers."""

    addresses: list[str]

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::1"], ["fe80::1%eth0"], []])
async def test_a_name_that_stands_for_an_inner_address_is_not_connected_to(addresses: list[str]) -> None:
    with pytest.raises(OSError, match="not a public address"):
        await PublicResolver(Names(addresses)).resolve("evil.example")


async def test_a_public_name_is_connected_to_at_the_address_that_was_examined() -> None:
    [found] = await PublicResolver(Names(["1.1.1.1"])).resolve("good.example", 443)
    assert (found["host"], is_public(found["host"])) == ("1.1.1.1", True)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "127.0.0.1"])
async def test_nothing_within_is_reached_however_its_address_is_written(receiver: Receiver, host: str) -> None:
    """Many notations of one address, some of which only the resolver understands."""
    sender = WebhookSender(timeout_s=60, connections_max=1, private=False)
    port = receiver.url.rpartition(":")[2].partition("/")[0]
    try:
        outcome = await sender.send(f"https://{host}:{port}/hook", [b"s"], "msg_1", "{}")
    finally:
        await sender.close()
    assert outcome.status is None
    refusals = ("ClientConnectorDNSError", "ClientConnectorError", "UnsafeDestination", "InvalidUrlClientError")
    assert outcome.error in refusals
    assert receiver.received == []
