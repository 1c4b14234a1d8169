"""The running stack takes the model in: price, load, smoke prompt, flags."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.local.errors import LaunchError
from deploy.local.stack import Stack, gateway_port
from deploy.local.state import kept_gateway_port, layout_from
from deploy.models.errors import ModelError
from deploy.models.registration import NewBuild

CALL_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 900.0
PRICE_TIMEOUT_S = 30.0
LOOK_S = 0.2


class RunningStack:
    """The stack of this checkout (or of TOLLGATE_STATE), while it runs."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        lines = stack.layout.dev_env.read_text().splitlines()
        self._values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    @staticmethod
    def find(root: Path, environment: Mapping[str, str]) -> RunningStack | None:
        """None when nothing runs."""
        layout = layout_from(root, environment)
        if not layout.dev_env.is_file():
            return None
        stack = Stack(layout, gateway_port(environment, kept_gateway_port(layout)), environment)
        return RunningStack(stack) if stack.supervisor.is_running() else None

    def publish_price(self) -> None:
        """Raises ModelError."""
        self._seed(self._stack.seed.prices)

    def make_flags(self) -> None:
        """Raises ModelError."""
        self._seed(self._stack.seed.flags)

    def load(self, build: NewBuild) -> None:
        """Wait until the build is ready. Raises ModelError with the reason why it is not."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        reason = "the catalogue does not list it"
        while time.monotonic() < deadline:
            found = self._build(build.name)
            if found is not None:
                reason = found["reason"]
                if found["state"] == "ready":
                    return
                if found["state"] == "unavailable":
                    raise ModelError(f"{build.name} cannot be loaded: {reason}")
            time.sleep(LOOK_S)
        raise ModelError(f"{build.name} was not ready after {LOAD_TIMEOUT_S:.0f} s: {reason}")

    def smoke(self, build: NewBuild) -> str:
        """What the model says to a first prompt, through the whole path. Raises ModelError."""
        path, body = _smoke(build)
        deadline = time.monotonic() + PRICE_TIMEOUT_S
        while True:  # chat and billing learn of a new model within seconds
            status, answer = self._call(path, self._values["TOLLGATE_API_KEY"], body)
            if status == 200:
                return _shown(answer)
            if status not in (404, 503) or time.monotonic() > deadline:
                raise ModelError(f"The first request failed ({status}): {answer.get('error', answer)}")
            time.sleep(LOOK_S)

    def _build(self, name: str) -> dict[str, Any] | None:
        path = "/api/v1/admin/inference/models"
        status, answer = self._call(path, self._values["TOLLGATE_ADMIN_TOKEN"])
        if status != 200:
            return None
        return next((b for model in answer["models"] for b in model["builds"] if b["name"] == name), None)

    def _call(self, path: str, token: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._values["TOLLGATE_URL"] + path, content, headers)  # noqa: S310 ours
        try:
            with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as response:  # noqa: S310 ours
                return int(response.status), json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {"error": error.read(500).decode(errors="replace")}
        except (OSError, ValueError) as error:
            return 503, {"error": str(error)}

    @staticmethod
    def _seed(step: Callable[[], object]) -> None:
        try:
            step()
        except LaunchError as error:
            raise ModelError(str(error)) from error


def _smoke(build: NewBuild) -> tuple[str, dict[str, Any]]:
    if build.kind == "embedding":
        return "/v1/embeddings", {"model": build.alias, "input": "hello"}
    if build.kind == "rerank":
        return "/v1/rerank", {"model": build.alias, "query": "hello", "documents": ["hello", "goodbye"]}
    messages = [{"role": "user", "content": "Say hello."}]
    return "/v1/chat/completions", {"model": build.alias, "messages": messages, "max_tokens": 16}


def _shown(answer: Mapping[str, Any]) -> str:
    if "choices" in answer:
        return str(answer["choices"][0]["message"]["content"])
    return f"{len(answer.get('data') or answer.get('results') or [])} results"
