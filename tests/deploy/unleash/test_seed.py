"""The seed makes the rollout scheme once, and never undoes what an operator did."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from deploy.unleash import seed
from deploy.unleash.seed import Alias, SeedFailed, read_aliases
from tests.deploy.unleash.console import ENVIRONMENT, Console


def test_makes_the_rollout_scheme(console: Console) -> None:
    alias = console.seeded_alias()
    assert console.titles(alias.model_flag) == ["dogfood", "canary", "stable"]
    builds = {}
    for strategy in console.strategies(alias.model_flag):
        (variant,) = strategy["variants"]
        builds[strategy["title"]] = json.loads(variant["payload"]["value"])["build"]
    assert builds == {"dogfood": alias.canary, "canary": alias.canary, "stable": alias.stable}
    canary = console.strategy(alias.model_flag, "canary")["parameters"]
    assert (canary["rollout"], canary["stickiness"]) == ("0", "userId")
    assert console.strategy(alias.model_flag, "dogfood")["segments"]
    assert [d["feature"] for d in console.flag(alias.model_flag)["dependencies"]] == [alias.kill_switch]
    assert console.environment(alias.model_flag)["enabled"]
    assert console.environment(alias.kill_switch)["enabled"]


def test_a_second_run_changes_nothing(console: Console) -> None:
    alias = console.seeded_alias()
    before = console.flag(alias.model_flag), console.flag(alias.kill_switch)
    assert console.seed(alias) == []
    assert (console.flag(alias.model_flag), console.flag(alias.kill_switch)) == before


def test_what_an_operator_changed_stays(console: Console) -> None:
    alias = console.seeded_alias()
    console.move_slider(alias.model_flag, 35)
    console.delete_strategy(alias.model_flag, "dogfood")
    console.set_payload(alias.model_flag, "stable", "json", '{"build": "another"}')
    console.switch(alias.kill_switch, on=False)
    before = console.flag(alias.model_flag), console.flag(alias.kill_switch)
    assert console.seed(alias) == []
    assert (console.flag(alias.model_flag), console.flag(alias.kill_switch)) == before


def test_a_flag_that_an_operator_made_is_left_alone(console: Console) -> None:
    alias = console.new_alias()
    console.create_flag(alias.model_flag)
    before = console.flag(alias.model_flag)
    assert f"{alias.model_flag} was not made by this program: left as it is" in console.seed(alias)
    assert console.flag(alias.model_flag) == before


class BreaksOff(seed.Unleash):
    """Breaks off right after its n-th write to a flag."""

    def __init__(self, url: str, token: str, environment: str, writes: int) -> None:
        super().__init__(url, token, environment)
        self._writes = writes

    def call(self, method: str, path: str, body: object = None, *, also_ok: Sequence[int] = ()) -> httpx.Response:
        response = super().call(method, path, body, also_ok=also_ok)
        if method == "POST" and "/features" in path:
            self._writes -= 1
            if self._writes == 0:
                raise SeedFailed("the power went")
        return response


@pytest.mark.parametrize("begun_with_one_build", [False, True])
def test_a_run_that_breaks_off_after_a_write_is_completed_by_the_next(
    console: Console, begun_with_one_build: bool
) -> None:
    alias = console.new_alias()
    if begun_with_one_build:
        console.seed(Alias(alias.name, alias.stable, None))
    for writes in (1, 1, 2, 2, 3, 3, *range(1, 40)):
        unleash = BreaksOff(console.url, console.token, ENVIRONMENT, writes)
        try:
            seed.Seed(unleash, lambda _line: None).run([alias])
            break
        except SeedFailed:
            continue
        finally:
            unleash.close()
    else:
        pytest.fail("never completed")
    assert console.titles(alias.model_flag) == ["dogfood", "canary", "stable"]
    assert console.environment(alias.model_flag)["enabled"]
    assert console.environment(alias.kill_switch)["enabled"]
    assert [d["feature"] for d in console.flag(alias.model_flag)["dependencies"]] == [alias.kill_switch]
    assert console.seed(alias) == []


def test_a_second_build_gets_its_canary_before_the_stable_strategy(console: Console) -> None:
    one_build = console.new_alias(builds=1)
    console.seed(one_build)
    assert console.titles(one_build.model_flag) == ["stable"]
    console.seed(Alias(one_build.name, one_build.stable, "another-build"))
    assert console.titles(one_build.model_flag) == ["dogfood", "canary", "stable"]


def test_the_catalogue_says_which_aliases(tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(
        '[models.a]\nstable = "a-2"\n[models.a.builds.a-1]\n[models.a.builds.a-2]\n[models.a.builds.a-3]\n'
        '[models.b]\nstable = "b-1"\n[models.b.builds.b-1]\n[models.without-builds]\n'
    )
    assert read_aliases(catalogue) == [Alias("a", "a-2", "a-1"), Alias("b", "b-1", None)]


@pytest.mark.parametrize(
    "text",
    ["not toml", '[models.a]\nstable = "x"\n[models.a.builds.a-1]\n', '[models."a/b".builds.a-1]\n'],
)
def test_a_wrong_catalogue_is_refused(tmp_path: Path, text: str) -> None:
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(text)
    with pytest.raises(SeedFailed):
        read_aliases(catalogue)


def test_waiting_for_unleash_has_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catalogue.toml").write_text("")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("UNLEASH_URL", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        monkeypatch.setenv("UNLEASH_ADMIN_TOKEN", "*:*.not-to-be-shown")
        status = seed.main(["--catalogue", str(tmp_path / "catalogue.toml"), "--wait-s", "0.3"])
    error = capsys.readouterr().err
    assert status == 1
    assert "is not ready after 0.3 s" in error
    assert "not-to-be-shown" not in error
