"""Nobody reaches what belongs to another organisation: every operation of the merged document is tried, a new one too.

Where a path, a query or a body names something by its id, a stranger puts the owner's id there. A parameter that these
tests do not know is a failure until they say whose it is; a body that is not accepted, until its schema has an example.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.journeys.conftest import unlimit, until
from tests.journeys.people import TIMEOUT_S, NewUser, User, asking, client, patiently
from tests.running_stack import RunningStack

COMPLETE_S = 120.0
SERVICES = {"auth", "billing", "chat", "inference"}
SCOPES = ("chat", "models", "inference", "billing:read", "billing:write", "keys:read", "keys:write")
EVERYBODYS = {"provider", "model", "build"}  # the installation's
ONES_OWN_PART = {"month", "subjects", "subject_id"}  # of the caller's own wallet, which everybody has
IN_BODIES = {"previous_response_id": "response_id", "source_id": "charge_id"}  # other names of what the owner has
OPERATORS_MIN, OBJECTS_MIN, NAMED_MIN = 23, 30, 10


@dataclass(frozen=True)
class Operation:
    """One of the document's."""

    method: str
    path: str
    service: str
    details: Mapping[str, Any]
    schemas: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def names(self) -> list[str]:
        """Of the parameters in its path."""
        return re.findall(r"{(\w+)}", self.path)

    @property
    def is_for_operators(self) -> bool:
        return self.path.startswith("/api/v1/admin/")

    @property
    def is_for_people(self) -> bool:
        """An API key is not enough."""
        return {"accessToken": []} in self.details["security"]

    @property
    def is_public(self) -> bool:
        return not self.details["security"]

    @property
    def queries(self) -> list[str]:
        return [p["name"] for p in self.details.get("parameters", ()) if p["in"] == "query"]

    @property
    def fields(self) -> Mapping[str, Any]:
        """Of its body."""
        found: Mapping[str, Any] = self._object(self._schema).get("properties", {})
        return found

    def body(self, **fields: Any) -> dict[str, Any] | None:
        """The smallest that its schema allows, or its example; None where it has none."""
        if not self._schema:
            return None
        schema = self._object(self._schema)
        example = schema.get("example") or {n: self._value(schema["properties"][n]) for n in schema.get("required", ())}
        return {**example, **fields}

    @property
    def _schema(self) -> Mapping[str, Any]:
        content = self.details.get("requestBody", {}).get("content", {})
        found: Mapping[str, Any] = content.get("application/json", {}).get("schema", {})
        return found

    def _object(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if "$ref" in schema:
            return self._object(self.schemas[schema["$ref"].rpartition("/")[2]])
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return self._object(choices[0])
        return schema

    def _value(self, schema: Mapping[str, Any]) -> Any:
        schema = self._object(schema)
        if "enum" in schema or "const" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if schema.get("format") == "uuid":
            return str(uuid4())
        smallest: dict[str, Any] = {
            "string": "x" * max(1, schema.get("minLength", 1)),
            "integer": schema.get("minimum", 1),
            "number": schema.get("minimum", 1),
            "boolean": True,
            "array": [],
            "object": {},
        }
        return smallest[schema["type"]]


@pytest.fixture
def operations(stack: RunningStack) -> list[Operation]:
    document: dict[str, Any] = {"tags": []}

    def is_complete() -> bool:  # a service that is slow to tell of itself is left out for some seconds
        document.update(httpx.get(f"{stack.url}/openapi.json", timeout=TIMEOUT_S).json())
        return {tag["name"] for tag in document["tags"]} == SERVICES

    until(is_complete, within_s=COMPLETE_S, what="every service is in the document")
    return [
        Operation(method.upper(), path, details["tags"][0], details, document["components"]["schemas"])
        for path, item in document["paths"].items()
        for method, details in item.items()
    ]


@dataclass
class Caller:
    """Somebody with an access token, and with a key that reaches as far."""

    user: User
    key: httpx.Client

    def ask(self, operation: Operation, ids: Mapping[str, str], *, body: Any = None, **query: str) -> httpx.Response:
        """Until it is not refused for now."""
        http = self.user.session if operation.is_for_people else self.key
        where = re.sub(r"{(\w+)}", lambda found: ids[found[1]], operation.path)
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        return patiently(
            lambda: http.request(operation.method, where, params=query or None, json=body, headers=headers)
        )

    def ask_naming(self, operation: Operation, ids: Mapping[str, str], name: str, value: str) -> httpx.Response:
        """With a value for one parameter of the query or one field of the body."""
        if name in operation.queries:
            return self.ask(operation, ids, body=operation.body(), **{name: value})
        return self.ask(operation, ids, body=operation.body(**{name: value}))


def caller(stack: RunningStack, user: User) -> Caller:
    unlimit(stack, user)
    made = user.new_key(scopes=SCOPES)
    wide = User(**{**vars(user), "key": made["key"], "key_id": made["id"]})
    unlimit(stack, wide)
    return Caller(user, user.clients.enter_context(client(user.url, made["key"])))


@pytest.fixture
def stranger(stack: RunningStack, fresh_user: NewUser) -> Caller:
    return caller(stack, fresh_user())


@dataclass
class Owner:
    """Somebody who has one of everything, and what each of it is called."""

    caller: Caller
    ids: dict[str, str]

    def named(self, operation: Operation) -> dict[str, str]:
        """The owner's ids for the parameters of a path; for what is nobody's, something."""
        missing = set(operation.names) - self.ids.keys() - EVERYBODYS - ONES_OWN_PART - {"id"}
        assert not missing, f"{operation}: say in this module whose {missing} is"
        own_part = {"month": f"{datetime.now(UTC):%Y-%m}", "subjects": "keys", "subject_id": self.ids["key_id"]}
        completion = self.ids["response_id" if operation.path.startswith("/v1/responses/") else "completion_id"]
        return {**dict.fromkeys(EVERYBODYS, "none"), **own_part, **self.ids, "id": completion}

    def sees(self, operations: list[Operation]) -> dict[str, Any]:
        """What stands at each address that has one of these ids, and the budgets."""
        found = {}
        for operation in operations:
            is_own = names_an_object(operation) or operation.path == "/api/v1/billing/budgets"
            if operation.method == "GET" and is_own and not operation.is_for_operators:
                answer = self.caller.ask(operation, self.named(operation))
                assert answer.status_code == 200, (str(operation), answer.text)
                found[str(operation)] = answer.json()
        return found

    def is_told_of(self, answer: httpx.Response) -> bool:
        """Whether an answer holds anything of the owner's."""
        return any(told in answer.text for told in (*self.ids.values(), self.caller.user.name))


def names_an_object(operation: Operation) -> bool:
    return bool(set(operation.names) - EVERYBODYS - ONES_OWN_PART)


def other(known: str) -> str:
    """An id of the same form that nothing has."""
    prefix = re.match("chatcmpl-|resp_", known)
    return f"{prefix[0]}{secrets.token_hex(12)}" if prefix else str(uuid4())


def without_request_id(answer: httpx.Response) -> Any:
    if not answer.headers["content-type"].endswith("json"):
        return answer.text
    found = answer.json()
    for part in (found, found.get("error")):
        if isinstance(part, dict):
            part.pop("request_id", None)
    return found


@pytest.fixture
def owner(stack: RunningStack, fresh_user: NewUser) -> Owner:
    user = fresh_user()
    own = caller(stack, user)

    def made(http: httpx.Client, path: str, **body: Any) -> str:
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        answer = patiently(lambda: http.post(path, json=body, headers=headers))
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    organization = f"/api/v1/organizations/{user.org_id}"
    ids = {
        "org_id": user.org_id,
        "organization_id": user.org_id,
        "user_id": user.user_id,
        "session_id": user.session.get("/api/v1/auth/sessions").json()["data"][0]["id"],
        "key_id": user.new_key()["id"],
        "invitation_id": made(user.session, f"{organization}/invitations"),
        "service_account_id": made(user.session, f"{organization}/service-accounts", name="batch"),
        "completion_id": made(own.key, "/v1/chat/completions", **asking(store=True, max_tokens=1)),
        "response_id": made(own.key, "/v1/responses", model="chat-mini", input="Hello", max_output_tokens=1),
        "charge_id": made(own.key, "/billing/charge", amount="1", description="a picture"),
    }
    with client(stack.url, stack.admin_token) as admin:
        transfer = {"org_id": user.org_id, "credits": "5", "reference": f"transfer {secrets.token_hex(6)}"}
        ids["topup_id"] = made(admin, "/api/v1/admin/billing/topups", **transfer)
    # Last: it is told of nothing that came before, so that what the owner sees of it stays as it is.
    ids["webhook_id"] = made(own.key, "/api/v1/billing/webhooks", url="https://example.com/hook")
    return Owner(own, ids)


def test_what_a_path_names_is_there_for_its_owner_alone(
    owner: Owner, stranger: Caller, operations: list[Operation]
) -> None:
    """To others it looks as if it did not exist, and it stays as it was."""
    before, tried = owner.sees(operations), 0
    for operation in operations:
        if operation.is_for_operators or not names_an_object(operation):
            continue
        tried += 1
        ids, body = owner.named(operation), operation.body()
        answer = stranger.ask(operation, ids, body=body)
        assert answer.status_code == 404, (str(operation), answer.text)
        missing = stranger.ask(operation, {name: other(ids[name]) for name in operation.names}, body=body)
        assert without_request_id(answer) == without_request_id(missing), str(operation)
        if "organization_id" in operation.queries:
            named = stranger.ask(operation, ids, body=body, organization_id=ids["org_id"])
            assert named.status_code == 404, (str(operation), named.text)
    assert tried >= OBJECTS_MIN
    assert owner.sees(operations) == before


def test_what_a_query_or_a_body_names_is_its_owners_alone_and_no_list_shows_it(
    owner: Owner, stranger: Caller, operations: list[Operation]
) -> None:
    before, tried = owner.sees(operations), 0
    for operation in operations:
        if operation.is_for_operators or operation.is_public or names_an_object(operation):
            continue
        ids = owner.named(operation)
        if operation.method == "GET":
            assert not owner.is_told_of(stranger.ask(operation, ids)), str(operation)
        for name in filter(is_id, (*operation.queries, *operation.fields)):
            tried += 1
            theirs = ids[IN_BODIES.get(name, name)]
            answer, missing = (stranger.ask_naming(operation, ids, name, named) for named in (theirs, other(theirs)))
            assert answer.status_code in (200, 400, 403, 404), (str(operation), name, answer.text)
            assert not owner.is_told_of(answer), (str(operation), name, answer.text)
            assert without_request_id(answer) == without_request_id(missing), (str(operation), name)
        if set(operation.names) & ONES_OWN_PART:
            assert stranger.ask(operation, ids, body=operation.body()).status_code < 500, str(operation)
    assert tried >= NAMED_MIN
    assert owner.sees(operations) == before


def is_id(name: str) -> bool:
    return name.endswith("_id")


def test_every_operators_address_refuses_everybody_else(
    owner: Owner, stranger: Caller, operations: list[Operation]
) -> None:
    tried = 0
    for operation in operations:
        if operation.is_for_operators:
            tried += 1
            for own in (stranger, owner.caller):
                answer = own.ask(operation, owner.named(operation), body=operation.body())
                assert answer.status_code == 403, (str(operation), answer.text)
    assert tried >= OPERATORS_MIN
