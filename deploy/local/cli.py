"""The commands behind the Makefile, run in `.venv`: up, down, status, logs, reset."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.local import bootstrap, logs, processes, status
from deploy.local.errors import LaunchError
from deploy.local.progress import terminal
from deploy.local.seed import Keys
from deploy.local.shutdown import stop_everything
from deploy.local.stack import STEPS, Stack, gateway_port
from deploy.local.state import Layout, exclusive, kept_gateway_port, layout_from
from deploy.local.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 100
INTERRUPTED = 130

WELCOME = """
Tollgate is up: {url}
  API key      {key}
  docs         {url}/docs
  flag console {console}   user {user}, password in {dev_env}

Try it with curl:

curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "chat-mini", "stream": true, "messages": [{{"role": "user", "content": "What is Tollgate?"}}]}}'

or with OpenAI's Python SDK (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
messages = [{{"role": "user", "content": "What is Tollgate?"}}]
print(client.chat.completions.create(model="chat-mini", messages=messages).choices[0].message.content)

`make status` shows the programs, `make logs` their logs, `make down` stops them. Scripts read {dev_env}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status of the process."""
    options = _parser().parse_args(arguments)
    layout = layout_from(ROOT, os.environ)
    try:
        return int(options.run(layout, options))
    except LaunchError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def up(layout: Layout, options: argparse.Namespace) -> int:
    """Start the stack, or say that it runs. On failure or Ctrl-C everything is stopped again."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exclusive(layout):
        port = gateway_port(os.environ, kept_gateway_port(layout))
        if Supervisor(layout).is_running() and port != kept_gateway_port(layout):
            raise LaunchError(
                f"The stack runs with its gateway on port {kept_gateway_port(layout)}. To move it to {port}: "
                f"make down, then make up TOLLGATE_PORT={port}"
            )
        stack = Stack(layout, port, os.environ)
        progress = terminal(bootstrap.STEPS + STEPS, bootstrap.STEPS)
        keys = stack.seed.kept_keys()
        pids = stack.supervisor.pids()
        if keys is None or not stack.supervisor.is_running() or stack.unhealthy():
            try:
                keys = stack.up(progress)
            except BaseException as error:
                _abandon(layout, interrupted=isinstance(error, KeyboardInterrupt))
                raise
        # A program that was only slow to answer was waited for, not started.
        if pids == stack.supervisor.pids():
            progress.say("Everything runs already.")
            if stack.is_outdated():
                progress.say("It was started with other settings or code paths: `make down`, `make up` applies them.")
    progress.say(_welcome(stack, keys))
    return 0


def _abandon(layout: Layout, *, interrupted: bool) -> None:
    """Stop what was started; a second Ctrl-C does not interrupt that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stderr.write("\nInterrupted. " if interrupted else "\n")
    sys.stderr.write("Stopping what was started …\n")
    stop_everything(layout)
    sys.stderr.write("Nothing is left running.\n")


def _welcome(stack: Stack, keys: Keys) -> str:
    url = stack.services.public_url
    values = stack.dev_env(keys)
    return WELCOME.format(
        url=url,
        key=keys.api_key,
        console=values["UNLEASH_URL"],
        user=values["UNLEASH_USER"],
        dev_env=_short(stack.layout.dev_env),
    )


def _short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def down(layout: Layout, options: argparse.Namespace) -> int:
    """Stop the stack and prove that nothing is left."""
    if not layout.state.exists():
        print(f"There is no stack in {layout.state}.")
        return 0
    with exclusive(layout):
        stop_everything(layout)
    print("Stopped. The data is kept; `make up` starts again.")
    return 0


def show_status(layout: Layout, options: argparse.Namespace) -> int:
    """Print the table; 1 when anything is not healthy."""
    port = kept_gateway_port(layout)
    if port is None or not Supervisor(layout).is_running():
        orphans = processes.of_stack(layout.stack_id)
        print(f"No stack runs in {layout.state}. `make up` starts one.")
        if orphans:
            print(f"{len(orphans)} of its processes outlived their supervisor: `make up` or `make down` ends them.")
        return 1
    stack = Stack(layout, port, os.environ)
    lines = status.rows(stack.supervisor, tuple(stack.programs().values()))
    print(status.table(lines))
    return 0 if all(line.problem is None for line in lines) else 1


def show_logs(layout: Layout, options: argparse.Namespace) -> int:
    """The end of one log or of all; with --follow also what comes."""
    present = sorted(path.stem for path in layout.log.glob("*.log")) if layout.log.exists() else []
    names = [options.program] if options.program else present
    if unknown := [name for name in names if name not in present]:
        raise LaunchError(f"There is no log of {unknown[0]!r}. There are: {', '.join(present) or 'none'}.")
    if not names:
        raise LaunchError(f"There are no logs in {layout.log}.")
    logs.show(layout, names, LOG_LINES if options.program else LOG_LINES // 10, sys.stdout)
    if options.follow:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            logs.follow(layout, names, sys.stdout)
    return 0


def reset(layout: Layout, options: argparse.Namespace) -> int:
    """Stop the stack and remove its state, after asking."""
    if not layout.state.exists():
        print(f"There is no stack in {layout.state}.")
        return 0
    if not options.yes:
        print(
            f"This stops the stack and removes {layout.state} with all its data. Type yes to go on: ",
            end="",
            flush=True,
        )
        if sys.stdin.readline().strip() != "yes":
            print("Nothing was removed.")
            return 0
    with exclusive(layout):
        stop_everything(layout)
    shutil.rmtree(layout.state)
    if layout.supervisor_socket.parent.exists():
        shutil.rmtree(layout.supervisor_socket.parent)
    print("Removed.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m deploy.local", description="The embedded stack.")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("up", help="start everything").set_defaults(run=up)
    commands.add_parser("down", help="stop everything").set_defaults(run=down)
    commands.add_parser("status", help="show the programs").set_defaults(run=show_status)
    log = commands.add_parser("logs", help="show the logs")
    log.add_argument("program", nargs="?", default="")
    log.add_argument("--follow", action="store_true")
    log.set_defaults(run=show_logs)
    erase = commands.add_parser("reset", help="remove the state, after asking")
    erase.add_argument("--yes", action="store_true")
    erase.set_defaults(run=reset)
    return parser


if __name__ == "__main__":
    sys.exit(main())
