"""Builds chosen by Unleash's flags: what moves them, and what never stops a request."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from openfeature import api
from openfeature.event import EventDetails, ProviderEvent
from openfeature.exception import ProviderFatalError

from deploy.unleash.seed import Alias
from shared.flags import BuildDecision, Flags, FlagSettings
from tests.deploy.unleash.console import Console
from tests.deploy.unleash.fixtures import UnleashServer
from tests.deploy.unleash.line import Line, until


@asynccontextmanager
async def running(settings: FlagSettings, domain: str = "test") -> AsyncIterator[Flags]:
    flags = Flags(settings, domain)
    await flags.start()
    try:
        yield flags
    finally:
        await flags.close()


def settings(
    unleash: UnleashServer, *, url: str | None = None, backup: Path | None = None, stale_after_ms: int = 15_000
) -> FlagSettings:
    return FlagSettings(
        url=(url or unleash.url) + "/api",
        token=unleash.client_token,
        app_name="test",
        backup=backup,
        refresh_interval_s=1,
        stale_after_ms=stale_after_ms,
    )


def decide(flags: Flags, alias: Alias, user: str = "user-1", org: str = "org-1", plan: str = "free") -> BuildDecision:
    return flags.model_build(alias.name, user_id=user, org_id=org, plan=plan, key_id="key-1")


async def serving(flags: Flags, alias: Alias, build: str | None, **who: str) -> BuildDecision:
    """The decision, once it is for `build`: Unleash itself takes a moment to publish what was edited."""
    await until(lambda: decide(flags, alias, **who).build == build)
    return decide(flags, alias, **who)


async def written(backup: Path, alias: Alias) -> None:
    await until(lambda: backup.exists() and alias.model_flag in backup.read_text())


# The operator's hand


async def test_the_slider_moves_everybody_within_ten_seconds(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    served = FlagSettings(unleash.url + "/api", unleash.client_token, "test", None)
    async with running(served) as flags:
        decision = await serving(flags, alias, alias.stable)
        assert decision == BuildDecision(alias.stable, alias.stable, "SPLIT", stale=False, allowed=True)
        console.move_slider(alias.model_flag, 100)
        await until(lambda: decide(flags, alias).build == alias.canary, deadline_s=10)
        console.move_slider(alias.model_flag, 0)
        await until(lambda: decide(flags, alias).build == alias.stable, deadline_s=10)


async def test_a_wider_canary_keeps_everybody_who_was_in_it(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    users = [f"user-{number}" for number in range(2_000)]
    async with running(settings(unleash)) as flags:

        def in_canary() -> set[str]:
            return {user for user in users if decide(flags, alias, user).build == alias.canary}

        console.move_slider(alias.model_flag, 10)
        await until(lambda: bool(in_canary()))
        ten = in_canary()
        console.move_slider(alias.model_flag, 25)
        await until(lambda: in_canary() != ten)
        quarter = in_canary()
    assert ten < quarter
    assert 140 <= len(ten) <= 260
    assert 420 <= len(quarter) <= 580


async def test_internal_organisations_get_the_canary_first(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    console.edit(
        alias.model_flag,
        "dogfood",
        {"op": "replace", "path": "/constraints", "value": [{"contextName": "org", "operator": "IN", "values": ["o"]}]},
        {"op": "replace", "path": "/segments", "value": []},
    )
    async with running(settings(unleash)) as flags:
        await serving(flags, alias, alias.canary, org="o")
        assert decide(flags, alias, org="other").build == alias.stable


async def test_the_canary_can_be_kept_to_a_plan(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    console.edit(
        alias.model_flag,
        "canary",
        {"op": "replace", "path": "/parameters/rollout", "value": "100"},
        {"op": "add", "path": "/constraints/-", "value": {"contextName": "plan", "operator": "IN", "values": ["pro"]}},
    )
    async with running(settings(unleash)) as flags:
        await serving(flags, alias, alias.canary, plan="pro")
        assert decide(flags, alias, plan="free").build == alias.stable


async def test_a_kill_switch_that_is_off_stops_the_alias_until_it_is_on_again(
    unleash: UnleashServer, console: Console
) -> None:
    alias, other = console.seeded_alias(), console.seeded_alias()
    async with running(settings(unleash)) as flags:
        await serving(flags, alias, alias.stable)
        await serving(flags, other, other.stable)
        console.switch(alias.kill_switch, on=False)
        await until(lambda: not decide(flags, alias).allowed)
        assert decide(flags, alias).build is None
        assert decide(flags, other).allowed
        console.switch(alias.kill_switch, on=True)
        await until(lambda: decide(flags, alias).build == alias.stable)


async def test_a_model_flag_that_is_off_means_the_stable_build(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    async with running(settings(unleash)) as flags:
        await serving(flags, alias, alias.stable)
        console.switch(alias.model_flag, on=False)
        await serving(flags, alias, None)
        assert decide(flags, alias) == BuildDecision(None, None, "DISABLED", stale=False, allowed=True)


async def test_an_unknown_flag_means_the_stable_build(unleash: UnleashServer, console: Console) -> None:
    alias = console.new_alias()
    async with running(settings(unleash)) as flags:
        assert decide(flags, alias) == BuildDecision(None, None, "FLAG_NOT_FOUND", stale=False, allowed=True)


async def test_a_payload_that_names_no_build_means_the_stable_build(unleash: UnleashServer, console: Console) -> None:
    alias = console.seeded_alias()
    async with running(settings(unleash)) as flags:
        for kind, value, reason in (
            ("json", '{"build": 7}', "INVALID_PAYLOAD"),
            ("string", "a-build", "TYPE_MISMATCH"),
            ("json", '{"build": "../../etc"}', "INVALID_PAYLOAD"),
            ("number", "1", "TYPE_MISMATCH"),
            ("json", '["build"]', "INVALID_PAYLOAD"),
        ):
            console.set_payload(alias.model_flag, "stable", kind, value)
            await until(lambda reason=reason: decide(flags, alias).reason == reason)  # type: ignore[misc]
            decision = decide(flags, alias)
            assert (decision.build, decision.allowed) == (None, True)


# Unleash away


async def test_unleash_away_at_start_is_bridged_by_the_backup(
    unleash: UnleashServer, console: Console, line: Line, tmp_path: Path
) -> None:
    alias, backup = console.seeded_alias(), tmp_path / "flags" / "backup.json"
    async with running(settings(unleash, backup=backup)):
        await written(backup, alias)
    await line.cut()
    events: list[ProviderEvent] = []
    client = api.get_client("with-backup")

    def noting(event: ProviderEvent) -> Callable[[EventDetails], None]:
        return lambda _details: events.append(event)

    for event in (ProviderEvent.PROVIDER_READY, ProviderEvent.PROVIDER_STALE):
        client.add_handler(event, noting(event))
    before = len(events)  # A handler is called at once for the state that the domain had.
    async with running(settings(unleash, url=line.url, backup=backup), "with-backup") as flags:
        decision = decide(flags, alias)
        assert (decision.build, decision.stale, decision.allowed) == (alias.stable, True, True)
        await until(lambda: events[before:] == [ProviderEvent.PROVIDER_READY, ProviderEvent.PROVIDER_STALE])
        assert (flags.state().status, flags.state().age_s) == ("stale", math.inf)
        await line.mend()
        await until(lambda: flags.state().status == "ready")
        await until(lambda: events[-1] == ProviderEvent.PROVIDER_READY)
        assert not decide(flags, alias).stale


async def test_without_backup_nothing_is_known_until_unleash_answers(
    unleash: UnleashServer, console: Console, line: Line
) -> None:
    alias = console.seeded_alias()
    console.switch(alias.kill_switch, on=False)
    await line.cut()
    async with running(settings(unleash, url=line.url)) as flags:
        assert flags.state().status == "error"
        assert decide(flags, alias) == BuildDecision(None, None, "PROVIDER_NOT_READY", stale=True, allowed=True)
        await line.mend()
        await until(lambda: flags.state().status == "ready")
        await until(lambda: not decide(flags, alias).allowed)


async def test_unleash_lost_on_the_way_leaves_the_last_decision_and_says_stale(
    unleash: UnleashServer, console: Console, line: Line
) -> None:
    alias = console.seeded_alias()
    async with running(settings(unleash, url=line.url, stale_after_ms=2_000)) as flags:
        await serving(flags, alias, alias.stable)
        await line.cut()
        await until(lambda: flags.state().status == "stale")
        console.move_slider(alias.model_flag, 100)
        decision = decide(flags, alias)
        assert (decision.build, decision.stale) == (alias.stable, True)
        await line.mend()
        await until(lambda: decide(flags, alias).build == alias.canary)
        assert flags.state().status == "ready"


async def test_a_silent_unleash_delays_start_and_close_by_a_few_timeouts_at_most(unleash: UnleashServer) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        configured = FlagSettings(url, unleash.client_token, "test", None, 1, request_timeout_ms=300)
        began = time.monotonic()
        async with running(configured) as flags:
            assert flags.state().status == "error"
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"version": 2, "features": [{"name": "model.x", "enab',
        b"\xff\xfe\x00",
        b"[]",
        b'{"features": {}}',
        b'{"features": [{"enabled": true}]}',
        b'{"version": 2, "features": [{"name": "model.x", "enabled": "perhaps", "strategies": 7}]}',
        b'{"features": []}' + b" " * 4096,
    ],
)
async def test_a_damaged_backup_is_ignored(unleash: UnleashServer, line: Line, tmp_path: Path, content: bytes) -> None:
    backup = tmp_path / "backup.json"
    backup.write_bytes(content)
    await line.cut()
    small = FlagSettings(line.url + "/api", unleash.client_token, "test", backup, 1, flag_set_bytes_max=4096)
    async with running(small) as flags:
        assert flags.state().status == "error"
        assert flags.model_build("x", user_id="u", org_id="o", plan="p", key_id="k").build is None


async def test_a_damaged_backup_is_replaced_by_the_next_good_flag_set(
    unleash: UnleashServer, console: Console, tmp_path: Path
) -> None:
    alias, backup = console.seeded_alias(), tmp_path / "backup.json"
    backup.write_text("{")
    async with running(settings(unleash, backup=backup)) as flags:
        await serving(flags, alias, alias.stable)
    assert alias.model_flag in {feature["name"] for feature in json.loads(backup.read_text())["features"]}


async def test_an_unwritable_backup_stops_nothing(unleash: UnleashServer, console: Console, tmp_path: Path) -> None:
    alias = console.seeded_alias()
    (tmp_path / "file").write_text("")
    async with running(settings(unleash, backup=tmp_path / "file" / "backup.json")) as flags:
        await serving(flags, alias, alias.stable)


async def test_an_answer_that_is_no_flag_set_changes_nothing(
    unleash: UnleashServer, console: Console, line: Line, tmp_path: Path
) -> None:
    alias, backup = console.seeded_alias(), tmp_path / "backup.json"
    async with running(settings(unleash, url=line.url, backup=backup, stale_after_ms=2_000)) as flags:
        await written(backup, alias)
        good = backup.read_text()
        await line.answer_instead(b"<html>Please sign in to this network</html>")
        await until(lambda: flags.state().status == "stale")
        assert decide(flags, alias).build == alias.stable
        assert backup.read_text() == good


async def test_a_wrong_token_is_not_ready_and_is_told_to_nobody(
    unleash: UnleashServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "default:development.a-secret-that-nobody-may-see"
    wrong = FlagSettings(unleash.url + "/api", secret, "test", None)
    async with running(wrong) as flags:
        assert flags.state().status == "error"
    assert "nobody-may-see" not in caplog.text
    assert "nobody-may-see" not in repr(wrong)


async def test_an_unusable_url_fails_at_start() -> None:
    flags = Flags(FlagSettings("no-scheme/api", "token", "test", None), "unusable")
    try:
        with pytest.raises(ProviderFatalError):
            await flags.start()
    finally:
        await flags.close()


async def test_close_leaves_no_thread_behind(unleash: UnleashServer) -> None:
    before = set(threading.enumerate())
    flags = Flags(settings(unleash), "closing")
    await flags.start()
    await flags.close()
    await flags.close()

    def left() -> list[str]:
        # The event loop's own pool of workers stays with the loop.
        return [t.name for t in set(threading.enumerate()) - before if not t.name.startswith("asyncio_")]

    await until(lambda: left() == [])
