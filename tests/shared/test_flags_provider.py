"""The provider keeps OpenFeature's contract for every type: the right value, or the default with an error code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import Reason
from openfeature.provider.no_op_provider import NoOpProvider

from shared.flags import FlagSettings, UnleashProvider
from tests.deploy.unleash.console import Console
from tests.deploy.unleash.fixtures import UnleashServer
from tests.deploy.unleash.line import until

DOMAIN = "provider-test"
USER = EvaluationContext("user-1", {"org": "org-1", "plan": "free"})


@pytest.fixture
async def client(unleash: UnleashServer) -> AsyncIterator[OpenFeatureClient]:
    provider = UnleashProvider(FlagSettings(unleash.url + "/api", unleash.client_token, "test", None, 1))
    await asyncio.to_thread(api.set_provider_and_wait, provider, DOMAIN)
    yield api.get_client(DOMAIN)
    await asyncio.to_thread(provider.shutdown)
    api.set_provider_and_wait(NoOpProvider(), DOMAIN)


async def test_each_payload_type_is_read_by_its_own_getter_only(client: OpenFeatureClient, console: Console) -> None:
    alias = console.seeded_alias()
    flag = alias.model_flag
    console.set_payload(flag, "stable", "string", "text")
    await until(lambda: client.get_string_value(flag, "default", USER) == "text")
    for details in (
        client.get_integer_details(flag, 1, USER),
        client.get_float_details(flag, 1.5, USER),
        client.get_object_details(flag, {}, USER),
        await client.get_integer_details_async(flag, 1, USER),
    ):
        assert details.value in (1, 1.5, {})
        assert (details.error_code, details.reason) == (ErrorCode.TYPE_MISMATCH, Reason.ERROR)
    console.set_payload(flag, "stable", "number", "3")
    await until(lambda: client.get_integer_value(flag, 1, USER) == 3)
    assert client.get_float_value(flag, 1.5, USER) == 3.0
    assert client.get_string_details(flag, "default", USER).error_code is ErrorCode.TYPE_MISMATCH
    console.set_payload(flag, "stable", "number", "2.5")
    await until(lambda: client.get_float_value(flag, 1.5, USER) == 2.5)
    assert client.get_integer_details(flag, 1, USER).error_code is ErrorCode.TYPE_MISMATCH
    console.set_payload(flag, "stable", "json", '["a", 1]')
    await until(lambda: client.get_object_value(flag, {}, USER) == ["a", 1])


async def test_an_unknown_flag_is_reported_for_every_type(client: OpenFeatureClient) -> None:
    for details in (
        client.get_boolean_details("no.such.flag", True, USER),
        client.get_string_details("no.such.flag", "default", USER),
        client.get_integer_details("no.such.flag", 1, USER),
        client.get_float_details("no.such.flag", 1.5, USER),
        client.get_object_details("no.such.flag", {"a": 1}, USER),
    ):
        assert details.value in (True, "default", 1, 1.5, {"a": 1})
        assert details.error_code is ErrorCode.FLAG_NOT_FOUND


async def test_no_attribute_name_breaks_an_evaluation(client: OpenFeatureClient, console: Console) -> None:
    flag = console.seeded_alias().model_flag
    condition = {"contextName": "properties", "operator": "IN", "values": ["p"]}
    console.edit(flag, "stable", {"op": "add", "path": "/constraints/-", "value": condition})
    odd = {"properties": "p", "userId": "other", "flag": True, "none": None, "list": ["a"], "object": {"a": 1}}
    user = EvaluationContext("user-1", odd)  # type: ignore[arg-type]
    await until(lambda: bool(client.get_object_value(flag, {}, user)) and not client.get_object_value(flag, {}, USER))


async def test_without_a_user_the_stable_strategy_still_matches(client: OpenFeatureClient, console: Console) -> None:
    alias = console.seeded_alias()
    await until(lambda: client.get_object_value(alias.model_flag, {}) == {"build": alias.stable})
    assert client.get_boolean_value(alias.kill_switch, False)
