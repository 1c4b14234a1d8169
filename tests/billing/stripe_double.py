"""Stripe's HTTP API, as far as billing speaks it: Checkout Sessions, idempotency keys, signed webhooks.

After https://docs.stripe.com/api/idempotent_requests: the first answer under a key is kept and given again, with
`Idempotent-Replayed: true`; the same key with other parameters is a 400 `idempotency_error`; one that is still under
way is a 409. Webhooks carry `Stripe-Signature: t=…,v1=…` (https://docs.stripe.com/webhooks#verify-manually); Stripe
promises neither their order nor that they come once.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import stripe
from aiohttp import web

SECRET_KEY = "sk_test_double"
WEBHOOK_SECRET = "whsec_double"


def _problem(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"type": kind, "message": message}}, status=status)


@dataclass
class StripeDouble:
    """`hang_after_success`, `fail_next`: how many of the next requests to make a session go wrong, and how."""

    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    intents: dict[str, dict[str, Any]] = field(default_factory=dict)
    disputes: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    hang_after_success: int = 0
    fail_next: int = 0
    url: str = ""
    _answers: dict[str, tuple[str, dict[str, Any] | None]] = field(default_factory=dict)

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/checkout/sessions"""
        if request.headers.get("Authorization") != f"Bearer {SECRET_KEY}":
            return _problem(401, "invalid_request_error", "Invalid API Key provided")
        form, key = dict(await request.post()), request.headers.get("Idempotency-Key", "")
        self.requests.append(key)
        if self.fail_next:
            self.fail_next -= 1
            return _problem(500, "api_error", "An unknown error occurred")
        body = json.dumps(sorted((k, str(v)) for k, v in form.items()))
        if key in self._answers:
            first, session = self._answers[key]
            if first != body:
                return _problem(400, "idempotency_error", "Keys can only be used with the same parameters")
            if session is None:
                return _problem(409, "idempotency_error", "There is currently another in-progress request")
            return web.json_response(session, headers={"Idempotent-Replayed": "true"})
        self._answers[key] = (body, None)
        session = self._session(form)
        self.sessions[session["id"]] = session
        self._answers[key] = (body, session)
        if self.hang_after_success:
            self.hang_after_success -= 1
            await asyncio.sleep(3_600)
        return web.json_response(session)

    async def retrieve(self, request: web.Request) -> web.Response:
        """GET /v1/checkout/sessions/{id}"""
        session = self.sessions.get(request.match_info["id"])
        if session is None:
            return _problem(404, "invalid_request_error", "No such checkout.session")
        return web.json_response(session)

    async def intent(self, request: web.Request) -> web.Response:
        """GET /v1/payment_intents/{id}?expand[]=latest_charge"""
        intent = self.intents.get(request.match_info["id"])
        if intent is None:
            return _problem(404, "invalid_request_error", "No such payment_intent")
        return web.json_response(intent)

    async def disputed(self, request: web.Request) -> web.Response:
        """GET /v1/disputes?payment_intent="""
        data = [d for d in self.disputes if d["payment_intent"] == request.query["payment_intent"]]
        return web.json_response({"object": "list", "data": data, "has_more": False, "url": "/v1/disputes"})

    def of(self, topup_id: str) -> dict[str, Any]:
        """The one session of a top-up."""
        [session] = [s for s in self.sessions.values() if s["client_reference_id"] == topup_id]
        return session

    def pay(self, topup_id: str) -> dict[str, Any]:
        """The customer pays; the event that says so."""
        session = self.of(topup_id)
        intent_id = f"pi_{session['id']}"
        session |= {"payment_status": "paid", "status": "complete", "payment_intent": intent_id}
        charge: dict[str, Any] = {"id": f"ch_{session['id']}", "object": "charge", "payment_intent": intent_id}
        charge |= {"amount": session["amount_total"], "amount_refunded": 0, "currency": session["currency"]}
        intent = {"id": intent_id, "object": "payment_intent", "metadata": session["metadata"]}
        self.intents.setdefault(intent_id, {**intent, "latest_charge": charge})
        return self.event("checkout.session.completed", session)

    def refund(self, topup_id: str, money_minor: int) -> list[dict[str, Any]]:
        """Some money goes back; the events that say so."""
        charge = self.intents[self.of(topup_id)["payment_intent"]]["latest_charge"]
        charge["amount_refunded"] += money_minor
        refund: dict[str, Any] = {"id": f"re_{secrets.token_hex(8)}", "object": "refund", "amount": money_minor}
        refund |= {"payment_intent": charge["payment_intent"], "status": "succeeded"}
        return [self.event("refund.created", refund), self.event("charge.refunded", charge)]

    def dispute(self, topup_id: str) -> dict[str, Any]:
        """The customer disputes the payment, all of it."""
        session = self.of(topup_id)
        dispute = {"id": f"dp_{secrets.token_hex(8)}", "object": "dispute", "payment_intent": session["payment_intent"]}
        dispute |= {"amount": session["amount_total"], "status": "needs_response"}
        self.disputes.append(dispute)
        return self.event("charge.dispute.created", dispute)

    def close(self, topup_id: str, status: str) -> dict[str, Any]:
        """The newest dispute ends: `won` or `lost`."""
        dispute = [d for d in self.disputes if d["payment_intent"] == self.of(topup_id)["payment_intent"]][-1]
        dispute["status"] = status
        return self.event("charge.dispute.closed", dispute)

    def expire(self, topup_id: str) -> dict[str, Any]:
        """The session's day is over; the event that says so."""
        session = self.of(topup_id)
        if session["status"] == "open":
            session["status"] = "expired"
        return self.event("checkout.session.expired", session | {"payment_status": "unpaid", "status": "expired"})

    def event(self, kind: str, session: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"evt_{secrets.token_hex(12)}",
            "object": "event",
            "type": kind,
            "created": int(time.time()),
            "data": {"object": dict(session)},
        }

    def _session(self, form: dict[str, Any]) -> dict[str, Any]:
        session_id = f"cs_test_{secrets.token_hex(16)}"
        price = "line_items[0][price_data]"
        return {
            "id": session_id,
            "object": "checkout.session",
            "mode": form["mode"],
            "status": "open",
            "payment_status": "unpaid",
            "client_reference_id": form["client_reference_id"],
            "currency": form[f"{price}[currency]"],
            "amount_total": int(form[f"{price}[unit_amount]"]) * int(form["line_items[0][quantity]"]),
            "metadata": {"topup_id": form["metadata[topup_id]"], "org_id": form["metadata[org_id]"]},
            "url": f"https://checkout.stripe.com/c/pay/{session_id}",
        }


def signed_event(
    event: dict[str, Any], *, secret: str = WEBHOOK_SECRET, age_s: int = 0
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a webhook."""
    payload = json.dumps(event)
    header = stripe.WebhookSignature.generate_signature_header(payload, secret, int(time.time()) - age_s)
    return payload.encode(), {"Stripe-Signature": header, "content-type": "application/json"}


@asynccontextmanager
async def stripe_double() -> AsyncIterator[StripeDouble]:
    """Stripe on a port of this machine."""
    double = StripeDouble()
    server = web.Application()
    server.router.add_post("/v1/checkout/sessions", double.create)
    server.router.add_get("/v1/checkout/sessions/{id}", double.retrieve)
    server.router.add_get("/v1/payment_intents/{id}", double.intent)
    server.router.add_get("/v1/disputes", double.disputed)
    runner = web.AppRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        double.url = "http://{}:{}".format(*runner.addresses[0][:2])
        yield double
    finally:
        await runner.cleanup()
