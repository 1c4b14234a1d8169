"""Put the rollout scheme into Unleash: `python -m deploy.unleash.seed`.

For every alias of triton_models/catalogue.toml that has a build:

    ops.<alias>.allowed   kill switch, on; parent of the next
    model.<alias>         strategies in order, the first match names the build:
        dogfood   100 % of the segment internal-orgs → the canary build
        canary      0 % of users, sticky by user     → the canary build; this is the operator's slider
        stable    100 % of everyone                  → the stable build

The canary build is the alias's first build that is not the stable one; while there is none, only `stable` is made.

Idempotent, and an operator's changes stay. Every step that was done is recorded as a tag `seed:<step>` on its flag and
never done again, so a strategy that the operator edits, deletes or switches off stays so; a run that broke off is
completed by the next. A flag that this program did not create (no tag `seed:created`) is left as it is.

Environment: UNLEASH_URL (http://host:port), UNLEASH_ADMIN_TOKEN, and UNLEASH_ENVIRONMENT (default `development`): the
environment whose strategies are written, which must be the one that the services' client token names. Unleash takes
both tokens at its first start, while it has none: INIT_ADMIN_API_TOKENS=`*:*.<secret>` and
INIT_BACKEND_API_TOKENS=`default:<environment>.<secret>` (Unleash 8 still takes the old name INIT_CLIENT_API_TOKENS).
Unleash without a licence has the environments `development` and `production`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

PROJECT = "/api/admin/projects/default/features"
SEGMENT = "internal-orgs"
# Unleash refuses a constraint without values, and a segment without constraints holds everybody.
NOBODY = "put-organisation-ids-here"
CONTEXT_FIELDS = (
    ("org", "Organisation id", True),
    ("plan", "Price class of the organisation", False),
)
STRATEGY_ORDER = ("dogfood", "canary", "stable")
STEPS = ("created", "everyone", *STRATEGY_ORDER, "parent", "on")
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}")


class SeedFailed(Exception):
    """The seed cannot go on; the message says why, and holds no secret."""


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias of the catalogue. `canary` is None while the alias has one build."""

    name: str
    stable: str
    canary: str | None

    @property
    def model_flag(self) -> str:
        return f"model.{self.name}"

    @property
    def kill_switch(self) -> str:
        return f"ops.{self.name}.allowed"


def read_aliases(catalogue: Path) -> list[Alias]:
    """The catalogue's aliases with at least one build. Raises SeedFailed."""
    try:
        models = tomllib.loads(catalogue.read_text(encoding="utf-8")).get("models", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SeedFailed(f"cannot read {catalogue}: {e}") from e
    aliases = []
    for name, model in models.items():
        builds = list(model.get("builds", {}))
        if not builds:
            continue
        if not ALIAS.fullmatch(name):
            raise SeedFailed(f"alias {name!r} cannot be a flag's name: letters, digits and . _ ~ - only")
        stable = model.get("stable", builds[0])
        if stable not in builds:
            raise SeedFailed(f"the stable build {stable!r} of {name} is not among its builds")
        aliases.append(Alias(name, stable, next((b for b in builds if b != stable), None)))
    return aliases


class Unleash:
    """Unleash's admin API, the few calls that the seed needs."""

    def __init__(self, url: str, token: str, environment: str, timeout_s: float = 10) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": token}, timeout=timeout_s)
        self._environment = environment

    def close(self) -> None:
        self._http.close()

    def wait_until_healthy(self, deadline_s: float) -> None:
        """Raises SeedFailed when /health has not answered within `deadline_s`."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                if self._http.get("/health", timeout=2).status_code == 200:
                    return
                reason = "it answers, but is not healthy"
            except httpx.TransportError as e:
                reason = type(e).__name__
            if time.monotonic() >= end:
                raise SeedFailed(f"Unleash at {self._http.base_url} is not ready after {deadline_s:g} s: {reason}")
            time.sleep(0.25)

    def call(self, method: str, path: str, body: object = None, *, also_ok: Sequence[int] = ()) -> httpx.Response:
        """Raises SeedFailed on a transport error and on a status that is neither 2xx nor in `also_ok`."""
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as e:
            raise SeedFailed(f"{method} {path}: {type(e).__name__}") from e
        if not response.is_success and response.status_code not in also_ok:
            raise SeedFailed(f"{method} {path}: HTTP {response.status_code}: {response.text[:300]}")
        return response

    def flag_path(self, flag: str, tail: str = "") -> str:
        return f"{PROJECT}/{flag}{tail}"

    def in_environment(self, flag: str, tail: str) -> str:
        return self.flag_path(flag, f"/environments/{self._environment}{tail}")

    def strategies(self, flag: str) -> list[dict[str, Any]]:
        """In the order in which they are evaluated."""
        listed: list[dict[str, Any]] = self.call("GET", self.in_environment(flag, "/strategies")).json()
        return sorted(listed, key=lambda strategy: strategy["sortOrder"])

    def tags(self, flag: str) -> set[str]:
        tags = self.call("GET", f"/api/admin/features/{flag}/tags").json()["tags"]
        return {tag["value"] for tag in tags if tag["type"] == "seed"}

    def add_tag(self, flag: str, step: str) -> None:
        self.call("POST", f"/api/admin/features/{flag}/tags", {"type": "seed", "value": step})


class Seed:
    """Makes what is missing; see the module's docstring for what it never touches."""

    def __init__(self, unleash: Unleash, report: Callable[[str], None]) -> None:
        self._unleash = unleash
        self._report = report

    def run(self, aliases: Sequence[Alias]) -> None:
        """Raises SeedFailed; what was done until then stays, and the next run completes it."""
        self._make_vocabulary()
        segment = self._make_segment()
        for alias in aliases:
            self._make_kill_switch(alias)
            self._make_model_flag(alias, segment)

    def _make_vocabulary(self) -> None:
        exists = (409,)
        for name, description, sticky in CONTEXT_FIELDS:
            body = {"name": name, "description": description, "stickiness": sticky}
            self._unleash.call("POST", "/api/admin/context", body, also_ok=exists)
        self._unleash.call(
            "POST",
            "/api/admin/tag-types",
            {"name": "seed", "description": "Steps that the set-up has done and will not repeat"},
            also_ok=exists,
        )
        for step in STEPS:
            self._unleash.call("POST", "/api/admin/tags", {"type": "seed", "value": step}, also_ok=exists)

    def _make_segment(self) -> int:
        """The id of the segment internal-orgs."""
        listed = self._unleash.call("GET", "/api/admin/segments").json()["segments"]
        for segment in listed:
            if segment["name"] == SEGMENT:
                return int(segment["id"])
        body = {
            "name": SEGMENT,
            "description": "Organisations that get a new build first",
            "constraints": [{"contextName": "org", "operator": "IN", "values": [NOBODY]}],
        }
        self._report(f"segment {SEGMENT}")
        return int(self._unleash.call("POST", "/api/admin/segments", body).json()["id"])

    def _make_kill_switch(self, alias: Alias) -> None:
        flag = alias.kill_switch
        done = self._make_flag(flag, "kill-switch", f"Off: {alias.name} answers 503 to everybody")
        if done is None:
            return
        self._once(flag, "everyone", done, partial(self._add_strategy, flag, "everyone", _strategy(flag, "everyone")))
        self._once(flag, "on", done, partial(self._switch_on, flag))

    def _make_model_flag(self, alias: Alias, segment: int) -> None:
        flag = alias.model_flag
        done = self._make_flag(flag, "release", f"Which build serves {alias.name}; the first matching strategy decides")
        if done is None:
            return
        wanted = {"stable": _strategy(flag, "stable", build=alias.stable)}
        if alias.canary is not None:
            wanted["dogfood"] = _strategy(flag, "dogfood", build=alias.canary, segments=[segment])
            wanted["canary"] = _strategy(flag, "canary", build=alias.canary, rollout=0, stickiness="userId")
        for title in STRATEGY_ORDER:
            if title in wanted:
                self._once(flag, title, done, partial(self._add_strategy, flag, title, wanted[title]))
        parent = {"feature": alias.kill_switch}
        self._once(
            flag,
            "parent",
            done,
            partial(self._unleash.call, "POST", self._unleash.flag_path(flag, "/dependencies"), parent),
        )
        self._once(flag, "on", done, partial(self._switch_on, flag))

    def _make_flag(self, flag: str, kind: str, description: str) -> set[str] | None:
        """Steps done so far; None when the flag is somebody else's, or archived."""
        if self._unleash.call("GET", self._unleash.flag_path(flag), also_ok=(404,)).status_code == 404:
            body = {
                "name": flag,
                "type": kind,
                "description": description,
                "impressionData": False,
                "tags": [{"type": "seed", "value": "created"}],
            }
            if self._unleash.call("POST", PROJECT, body, also_ok=(409,)).status_code == 409:
                self._report(f"{flag} is archived: left as it is")
                return None
            self._report(f"flag {flag}")
            return {"created"}
        done = self._unleash.tags(flag)
        if "created" not in done:
            self._report(f"{flag} was not made by this program: left as it is")
            return None
        return done

    def _once(self, flag: str, step: str, done: set[str], action: Callable[[], object]) -> None:
        if step in done:
            return
        action()
        self._unleash.add_tag(flag, step)
        done.add(step)

    def _add_strategy(self, flag: str, title: str, strategy: Mapping[str, Any]) -> None:
        """Unless a run that broke off before it could record the step has added it."""
        if all(existing["title"] != title for existing in self._unleash.strategies(flag)):
            self._unleash.call("POST", self._unleash.in_environment(flag, "/strategies"), strategy)
            self._report(f"{flag}: strategy {title}")
        self._sort(flag)

    def _sort(self, flag: str) -> None:
        """Ours in their order; an operator's own strategies stay in front, where they were put to win."""
        rank = {title: position for position, title in enumerate(STRATEGY_ORDER)}
        ordered = sorted(self._unleash.strategies(flag), key=lambda s: rank.get(s["title"], -1))
        body = [{"id": strategy["id"], "sortOrder": position} for position, strategy in enumerate(ordered)]
        self._unleash.call("POST", self._unleash.in_environment(flag, "/strategies/set-sort-order"), body)

    def _switch_on(self, flag: str) -> None:
        self._unleash.call("POST", self._unleash.in_environment(flag, "/on"))


def _strategy(
    flag: str,
    title: str,
    *,
    build: str | None = None,
    rollout: int = 100,
    stickiness: str = "default",
    segments: Sequence[int] = (),
) -> dict[str, Any]:
    """A gradual rollout. A stickiness by user matches nobody without a user id, hence only where it is needed."""
    variant = {
        "name": build,
        "weight": 1000,
        "weightType": "variable",
        "stickiness": "default",
        "payload": {"type": "json", "value": json.dumps({"build": build})},
    }
    return {
        "name": "flexibleRollout",
        "title": title,
        "disabled": False,
        "parameters": {"rollout": str(rollout), "stickiness": stickiness, "groupId": flag},
        "constraints": [],
        "segments": list(segments),
        "variants": [variant] if build is not None else [],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.unleash.seed", description="Seed Unleash's flags.")
    parser.add_argument("--catalogue", type=Path, default=Path("triton_models/catalogue.toml"))
    parser.add_argument("--wait-s", type=float, default=120, help="how long to wait for Unleash")
    options = parser.parse_args(arguments)
    try:
        url, token = os.environ["UNLEASH_URL"], os.environ["UNLEASH_ADMIN_TOKEN"]
    except KeyError as e:
        print(f"seed: {e.args[0]} is not set", file=sys.stderr)
        return 2
    unleash = Unleash(url, token, os.environ.get("UNLEASH_ENVIRONMENT", "development"))
    try:
        aliases = read_aliases(options.catalogue)
        unleash.wait_until_healthy(options.wait_s)
        Seed(unleash, lambda line: print(f"seed: {line}", flush=True)).run(aliases)
    except SeedFailed as e:
        print(f"seed: {e}", file=sys.stderr)
        return 1
    finally:
        unleash.close()
    print(f"seed: {len(aliases)} aliases ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
