"""What the supervisor must know of one program of the stack."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.errors import NotReady

HEALTH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Program:
    """One supervised process.

    `health` returns when the program can be used and raises NotReady until then. `deadline_s` bounds the wait for
    it; `remedy` is what a person can try when it passes. `environment` is everything the process gets: nothing is
    inherited but PATH, HOME and the locale.
    """

    name: str
    title: str
    command: tuple[str, ...]
    directory: Path
    health: Callable[[], None]
    deadline_s: float
    remedy: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    stop_signal: str = "TERM"
    stop_wait_s: int = 20
    # Whether the signal goes to the whole process group; SIGKILL, after stop_wait_s, always does.
    signal_group: bool = True


def http_health(url: str) -> Callable[[], None]:
    """A check that holds while `url` answers 200."""

    def check() -> None:
        try:
            with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:  # noqa: S310 our own http:// URL
                response.read(4096)
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode(errors="replace").strip()
            raise NotReady(f"{url} answers {error.code}: {detail}") from None
        except (OSError, http.client.HTTPException) as error:
            raise NotReady(f"{url} does not answer: {error}") from None

    return check
