"""The complete stack as a test sees it: its addresses, and a hand on its processes."""

import os
import signal
import time
from dataclasses import dataclass

import httpx

from deploy.local.errors import NotReady
from deploy.local.health import log_tail, wait_healthy, why_unhealthy
from deploy.local.seed import Keys
from deploy.local.stack import Stack

RESTART_TIMEOUT_S = 120.0
POLL_S = 0.05
REACH_POLL_S = 0.5  # these requests count against the administrator's limits
NOT_YET = {429, 502, 503, 504}
AT_REST = {"ready", "unloaded"}
A_PATH_OF = {
    "auth": "/.well-known/jwks.json",
    "billing": "/api/v1/billing/wallet",
    "chat": "/v1/models",
    "inference": "/api/v1/admin/inference/models",
}


@dataclass(frozen=True)
class RunningStack:
    """A healthy stack. Programs: postgres, valkey, triton, unleash, auth, billing, inference, chat, gateway."""

    stack: Stack
    keys: Keys

    @property
    def url(self) -> str:
        """The gateway, without a slash at the end."""
        return self.stack.services.public_url

    @property
    def api_key(self) -> str:
        """The demo user's key."""
        return self.keys.api_key

    @property
    def admin_token(self) -> str:
        """The administrator's key, with every scope."""
        return self.keys.admin_token

    @property
    def env(self) -> dict[str, str]:
        """What dev.env holds: addresses, tokens, the console's user."""
        return self.stack.dev_env(self.keys)

    def pid(self, program: str) -> int:
        """The process id; 0 while it does not run."""
        return self.stack.supervisor.states()[program].pid

    def restarts(self, program: str) -> int:
        """How often it was started again since the stack began."""
        return self.stack.supervisor.starts()[program] - 1

    def kill(self, program: str) -> int:
        """SIGKILL, as an accident would; the supervisor starts it again. Returns the process id that died."""
        pid = self.pid(program)
        # Process 0 would be the group of the tests themselves.
        assert pid > 0, f"{program} does not run: {self.log(program)}"
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self, program: str) -> None:
        """Stop a program and keep it stopped; start it again before the test ends."""
        self.stack.supervisor.stop(program)

    def start(self, program: str) -> None:
        """Start a stopped program and wait until everything is healthy."""
        self.stack.supervisor.start(program)
        self.wait_healthy()

    def wait_restarted(self, program: str, old_pid: int) -> None:
        """Wait until the supervisor has replaced a killed process and the new one is healthy."""
        deadline = time.monotonic() + RESTART_TIMEOUT_S
        specification = self.stack.programs()[program]
        while self.pid(program) in {0, old_pid} or why_unhealthy(self.stack.supervisor, specification) is not None:
            if time.monotonic() > deadline:
                raise NotReady(f"{program} was not restarted: {self.log(program)}")
            time.sleep(POLL_S)

    def wait_healthy(self) -> None:
        """Wait until every program is healthy again, the gateway reaches its services, and every build is served."""
        for program in self.stack.programs().values():
            wait_healthy(self.stack.supervisor, self.stack.layout, program)
        deadline = time.monotonic() + RESTART_TIMEOUT_S
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.admin_token}"}) as http:
            for service, path in A_PATH_OF.items():
                while not _is_served(answer := http.get(path)):
                    if time.monotonic() > deadline:
                        raise NotReady(f"{service} is not served: {answer.text[:2_000]} {self.log('gateway')}")
                    time.sleep(REACH_POLL_S)

    def log(self, program: str, lines: int = 50) -> str:
        """The end of a program's log."""
        return "\n".join(log_tail(self.stack.layout, program, lines))


def _is_served(answer: httpx.Response) -> bool:
    """Not refused for now, and of models, that no build is on its way."""
    if answer.status_code in NOT_YET:
        return False
    if answer.request.url.path != A_PATH_OF["chat"]:
        return True
    return all(build["state"] in AT_REST for model in answer.json()["data"] for build in model["builds"])
