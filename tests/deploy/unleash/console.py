"""What an operator does in Unleash's console, through the same API."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import httpx

from deploy.unleash.seed import Alias, Seed, Unleash

ENVIRONMENT = "development"
PROJECT = "/api/admin/projects/default/features"
Json = dict[str, Any]


@dataclass
class Console:
    """Unleash's admin API with an admin token. Tests use aliases of their own, since they share one server."""

    url: str
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": self.token}, timeout=60)

    def close(self) -> None:
        self.http.close()

    def new_alias(self, *, builds: int = 2) -> Alias:
        """A name that no other test uses, not seeded yet."""
        name = f"test-{secrets.token_hex(4)}"
        return Alias(name, f"{name}-stable", f"{name}-canary" if builds > 1 else None)

    def seeded_alias(self) -> Alias:
        alias = self.new_alias()
        self.seed(alias)
        return alias

    def seed(self, *aliases: Alias) -> list[str]:
        """Run the seed for these aliases only; what it reported."""
        lines: list[str] = []
        unleash = Unleash(self.url, self.token, ENVIRONMENT)
        try:
            Seed(unleash, lines.append).run(aliases)
        finally:
            unleash.close()
        return lines

    def call(self, method: str, path: str, body: object = None) -> Any:
        response = self.http.request(method, path, json=body)
        response.raise_for_status()
        return response.json() if response.content else None

    def flag(self, flag: str) -> Json:
        """As defined, without what Unleash itself writes to it as time passes."""
        found: Json = self.call("GET", f"{PROJECT}/{flag}")
        found.pop("lifecycle", None)
        return found

    def environment(self, flag: str) -> Json:
        return next(e for e in self.flag(flag)["environments"] if e["name"] == ENVIRONMENT)

    def strategies(self, flag: str) -> list[Json]:
        listed: list[Json] = self.call("GET", f"{PROJECT}/{flag}/environments/{ENVIRONMENT}/strategies")
        return sorted(listed, key=lambda s: s["sortOrder"])

    def titles(self, flag: str) -> list[str]:
        return [s["title"] for s in self.strategies(flag)]

    def strategy(self, flag: str, title: str) -> Json:
        return next(s for s in self.strategies(flag) if s["title"] == title)

    def edit(self, flag: str, title: str, *operations: Json) -> None:
        """Apply a JSON Patch to one strategy."""
        strategy = self.strategy(flag, title)["id"]
        path = f"{PROJECT}/{flag}/environments/{ENVIRONMENT}/strategies/{strategy}"
        self.call("PATCH", path, list(operations))

    def delete_strategy(self, flag: str, title: str) -> None:
        strategy = self.strategy(flag, title)["id"]
        self.call("DELETE", f"{PROJECT}/{flag}/environments/{ENVIRONMENT}/strategies/{strategy}")

    def move_slider(self, flag: str, percent: int) -> None:
        self.edit(flag, "canary", {"op": "replace", "path": "/parameters/rollout", "value": str(percent)})

    def set_payload(self, flag: str, title: str, kind: str, value: str) -> None:
        payload = {"type": kind, "value": value}
        self.edit(flag, title, {"op": "replace", "path": "/variants/0/payload", "value": payload})

    def switch(self, flag: str, *, on: bool) -> None:
        self.call("POST", f"{PROJECT}/{flag}/environments/{ENVIRONMENT}/{'on' if on else 'off'}")

    def create_flag(self, flag: str) -> None:
        self.call("POST", PROJECT, {"name": flag, "type": "release"})
