"""Every secret that a test run shows to the stack or gets from it; none of them may stand in a log.

Whatever goes through httpx to the gateway is looked at, the SDKs' requests too: credentials in headers and cookies, and
every string in a JSON body under a name that says that it is secret. What did not go that way has a shape of its own.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

SECRET_CHARS_MIN = 12  # shorter ones are in a log by chance
WORD = re.compile(r"[a-z_.]+")
ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / name for name in ("services", "shared", "deploy/local", "triton_models", "tests")]
SECRET_NAME = re.compile(r"(^|_)(password|secret)$|_token$")
SECRET_HEADERS = ("authorization", "x-api-key", "x-csrf-token", "proxy-authorization")
SHAPES = {
    "an API key": re.compile(r"tg_live_\w{24,}"),
    "a refresh token": re.compile(r"tg_refresh_[\w-]{16,}"),
    "an invitation": re.compile(r"tg_invite_[\w-]{16,}"),
    "a token of an e-mail": re.compile(r"tg_email_[\w-]{16,}"),
    "a webhook's secret": re.compile(r"whsec_[\w+/=-]{16,}"),
    "an access token": re.compile(r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{20,}"),
    "a password in an address": re.compile(r"\w+://[\w.-]*:[^@/\s\"'*]{8,}@[\w.-]+"),
}


class SecretsSeen:
    """See the module."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()

    def add(self, secrets: Iterable[str]) -> None:
        """Those that are known otherwise."""
        self._secrets |= {s for s in secrets if len(s) >= SECRET_CHARS_MIN}

    def look_at(self, request: httpx.Request, response: httpx.Response) -> None:
        """Take the secrets out of an exchange."""
        for name in SECRET_HEADERS:
            for value in request.headers.get_list(name):
                self.add([value.partition(" ")[2] or value])
        for line in (*request.headers.get_list("cookie"), *response.headers.get_list("set-cookie")):
            self.add(part.partition("=")[2].strip('"') for part in line.split("; ")[:8] if "tg_" in part)
        for message in (request, response):
            try:
                self._walk(json.loads(message.content))
            except (httpx.RequestNotRead, httpx.ResponseNotRead, ValueError):
                continue  # a stream, or no JSON

    def in_logs(self, directory: Path) -> list[str]:
        """What stands where, without the secrets themselves."""
        found = []
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            text = path.read_text(errors="replace")
            found += [f"{path.name}: {what}" for what, shape in SHAPES.items() if shape.search(text)]
            found += [f"{path.name}: {s[:4]}…" for s in self._secrets if s in text and not _is_constant(s)]
        return found

    def __len__(self) -> int:
        return len(self._secrets)

    def _walk(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self.add(v for name, v in value.items() if isinstance(v, str) and SECRET_NAME.search(name))
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                self._walk(item)


def _is_constant(secret: str) -> bool:
    """Whether it is a word of our own sources: Hypothesis makes strings of their constants, which logs name anyway."""
    if not WORD.fullmatch(secret):
        return False
    return any(secret in path.read_text() for folder in SOURCES for path in folder.rglob("*.py"))


@contextmanager
def watching(url: str, seen: SecretsSeen) -> Iterator[None]:
    """While this lasts, `seen` looks at everything that httpx sends to `url`."""
    send, send_async = httpx.Client.send, httpx.AsyncClient.send

    def look(request: httpx.Request, response: httpx.Response) -> httpx.Response:
        if str(request.url).startswith(url):
            seen.look_at(request, response)
        return response

    def watched(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        return look(request, send(client, request, **options))

    async def watched_async(client: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        return look(request, await send_async(client, request, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.Client, "send", watched)
        patch.setattr(httpx.AsyncClient, "send", watched_async)
        yield
