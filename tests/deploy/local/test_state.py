"""What a stack keeps: private files, secrets that stay, ports that are free."""

import configparser
import os
import socket
import stat
from pathlib import Path

import pytest

from deploy.local.bootstrap import locked, read_env_file
from deploy.local.errors import LaunchError
from deploy.local.programs import Program
from deploy.local.stack import gateway_port
from deploy.local.state import Layout, exclusive, layout_from, load_ports, load_secrets, write_private
from deploy.local.supervisor import render_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(ROOT, tmp_path / "state")
    layout.prepare()
    return layout


def test_state_directory_follows_the_environment(tmp_path: Path) -> None:
    assert layout_from(tmp_path, {}).state == tmp_path / ".tollgate"
    assert layout_from(tmp_path, {"TOLLGATE_STATE": "other"}).state == tmp_path / "other"
    assert layout_from(tmp_path, {"TOLLGATE_STATE": "/srv/x"}).state == Path("/srv/x")


def test_stacks_of_different_states_have_different_ids(tmp_path: Path) -> None:
    assert Layout(ROOT, tmp_path / "a").stack_id != Layout(ROOT, tmp_path / "b").stack_id


def test_a_directory_with_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    layout = Layout(ROOT, tmp_path)
    with pytest.raises(LaunchError, match="is not empty and holds no stack"):
        layout.prepare()
    with pytest.raises(LaunchError, match="is not empty and holds no stack"), exclusive(layout):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_secrets_are_made_once_and_private(layout: Layout) -> None:
    first = load_secrets(layout)
    assert load_secrets(layout) == first
    assert len(set(first.values())) == len(first)
    assert stat.S_IMODE((layout.state / "secrets.json").stat().st_mode) == 0o600


def test_private_files_are_never_readable_by_others(layout: Layout) -> None:
    old = os.umask(0)
    try:
        write_private(layout.dev_env, "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE(layout.dev_env.stat().st_mode) == 0o600


def test_ports_are_kept_until_another_program_takes_one(layout: Layout) -> None:
    first = load_ports(layout, 8080, check=True)
    assert len(set(first.values())) == len(first)
    assert load_ports(layout, 8080, check=True) == first
    with socket.create_server(("127.0.0.1", first["unleash"])):
        assert load_ports(layout, 8080, check=False) == first
        second = load_ports(layout, 8080, check=True)
    assert {name for name in first if first[name] != second[name]} == {"unleash"}


def test_a_port_moves_out_of_the_gateways_way(layout: Layout) -> None:
    first = load_ports(layout, 8080, check=True)
    second = load_ports(layout, first["postgres"], check=False)
    assert second["gateway"] == first["postgres"]
    assert len(set(second.values())) == len(second)


@pytest.mark.parametrize("text", ["0", "65536", "http", "-1", "８０"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="TOLLGATE_PORT is"):
        gateway_port({"TOLLGATE_PORT": text}, None)


def test_the_gateways_port_is_the_callers_then_the_last_then_8080() -> None:
    assert gateway_port({"TOLLGATE_PORT": "9000"}, 8090) == 9000
    assert gateway_port({}, 8090) == 8090
    assert gateway_port({"TOLLGATE_PORT": ""}, None) == 8080


def test_a_stack_is_started_or_stopped_by_one_command_at_a_time(layout: Layout) -> None:
    with exclusive(layout), pytest.raises(LaunchError, match="Another command"), exclusive(layout):
        pass


def program(command: tuple[str, ...], environment: dict[str, str]) -> Program:
    return Program(
        name="probe",
        title="probe",
        command=command,
        directory=ROOT,
        health=lambda: None,
        deadline_s=1,
        remedy="none",
        environment=environment,
    )


def test_configuration_is_read_back_as_it_was_meant(layout: Layout) -> None:
    text = render_config(layout, [program(("/bin/echo", "50% of it", "a b"), {"SECRET": "a%b,c=d"})])
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=(";", "#"))
    parser.read_string(text)
    section = parser["program:probe"]
    assert section["command"] == "/bin/echo '50%% of it' 'a b'"
    assert section["environment"] == 'SECRET="a%%b,c=d"'
    assert section["autostart"] == "false"
    assert parser["unix_http_server"]["chmod"] == "0700"


@pytest.mark.parametrize("value", ['say "x"', "two\nlines", "x ;y"])
def test_what_the_configuration_cannot_hold_is_refused(layout: Layout, value: str) -> None:
    with pytest.raises(LaunchError, match="cannot run with a path or setting"):
        render_config(layout, [program(("/bin/true",), {"NAME": value})])


def test_a_long_path_gets_its_socket_elsewhere() -> None:
    short, long = Layout(ROOT, Path("/srv/t")), Layout(ROOT, Path("/srv") / ("t" * 100))
    assert short.supervisor_socket == Path("/srv/t/supervisor.sock")
    assert len(str(long.supervisor_socket)) < 100


def test_one_requirement_of_a_lock() -> None:
    blocks = ("a==1 \\\n    --hash=1\n", "b-c==2 \\\n    --hash=2 \\\n    --hash=3\n", "d==4 \\\n    --hash=4\n")
    lock = "".join(blocks)
    assert locked("b-c", lock) == blocks[1]
    assert locked("d", lock) == blocks[2]
    with pytest.raises(ValueError, match="is not in the lock"):
        locked("b", lock)


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    assert read_env_file(path) == {}
    path.write_text("# a comment\n\nTOLLGATE_PORT=8090\n NAME = a=b \n")
    assert read_env_file(path) == {"TOLLGATE_PORT": "8090", "NAME": "a=b"}
