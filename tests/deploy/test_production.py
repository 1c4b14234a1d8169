"""docker-compose.yml, the images and what watches them fit together, and fit the services as they are.

The tools docker-compose, promtool and amtool are used where they are installed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from pydantic_settings import BaseSettings

from deploy.docker.env import generate
from shared import telemetry

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "auth", "billing", "chat", "inference")
ONCE = ("auth-migrate", "billing-migrate", "chat-migrate", "prices", "flags")
SECRETS = dict(generate())
CHOSEN = {"TOLLGATE_PUBLIC_URL": "https://api.example.com"}
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> Json:
    """The compose file with its merges, not interpolated."""
    loaded: Json = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def interpolated(environment: Mapping[str, str]) -> dict[str, str]:
    """An `environment` as the container gets it, with secrets generated and defaults taken."""
    known = SECRETS | CHOSEN

    def value(match: re.Match[str]) -> str:
        return known.get(match["name"], (match["rest"] or "") if match["kind"] == "-" else "")

    return {name: VARIABLE.sub(value, str(text)) for name, text in environment.items()}


# The compose file


def test_only_the_gateway_is_published_and_consoles_on_this_host(compose: Json) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert set(published) == {"gateway", "unleash", "grafana"}
    assert published.pop("gateway") == ["${TOLLGATE_BIND:-127.0.0.1}:${TOLLGATE_PORT:-8080}:8080"]
    for (port,) in published.values():
        assert port.startswith("127.0.0.1:")


def test_only_what_is_published_has_a_way_out(compose: Json) -> None:
    assert compose["networks"]["internal"] == {"internal": True}
    outward = {name for name, service in compose["services"].items() if "edge" in service["networks"]}
    assert outward == {"gateway", "unleash", "grafana"}


def test_every_container_has_limits_a_restart_policy_and_bounded_logs(compose: Json) -> None:
    for name, service in compose["services"].items():
        assert service["mem_limit"], name
        assert service["cpus"], name
        assert service["pids_limit"], name
        assert service["restart"] == ("on-failure" if name in ONCE else "unless-stopped"), name
        assert service["logging"]["options"]["max-size"], name
        assert "no-new-privileges:true" in service["security_opt"], name


def test_our_own_containers_are_read_only_and_without_capabilities(compose: Json) -> None:
    for name in (*SERVICES, *ONCE):
        service = compose["services"][name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


def test_every_image_has_a_version(compose: Json) -> None:
    for name, service in compose["services"].items():
        image, _, tag = service["image"].partition(":")
        assert image, name
        assert tag, name
        assert tag != "latest", name


def test_every_component_says_when_it_is_healthy(compose: Json) -> None:
    images = {
        stage for stage, lines in dockerfile_stages().items() if any(ln.startswith("HEALTHCHECK") for ln in lines)
    }
    assert images >= {*SERVICES, "triton"}
    for name, service in compose["services"].items():
        if name in ONCE or "build" in service:
            continue
        # Tempo's image has nothing to ask with.
        assert "healthcheck" in service or name == "tempo", name


def test_what_is_depended_on_exists_and_can_say_so(compose: Json) -> None:
    services = compose["services"]
    for name, service in services.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert other in services, name
            assert "profiles" not in services[other], f"{name}: {other} may not be there"
            assert wanted["condition"] == ("service_completed_successfully" if other in ONCE else "service_healthy")


def test_secrets_have_no_defaults_and_every_variable_is_documented() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    documented = set(re.findall(r"^#?([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    demanded = set()
    for match in VARIABLE.finditer(text):
        assert match["name"] in documented, match["name"]
        if match["kind"] == "?":
            demanded.add(match["name"])
        else:
            assert match["kind"] == "-", match[0]
            assert match["name"] not in SECRETS, f"{match['name']} is a secret with a default"
    assert demanded == set(SECRETS) | set(CHOSEN)
    assert set(SECRETS) <= documented


def settings_of(module: str) -> Iterator[type[BaseSettings]]:
    for _, found in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        if issubclass(found, BaseSettings) and found.__module__ == module:
            yield found


@pytest.mark.parametrize(
    ("container", "service", "wanted"),
    [
        *((service, service, r"(?!Migration|Bootstrap|Database).*Settings") for service in SERVICES),
        ("auth-migrate", "auth", "MigrationSettings"),
        ("billing-migrate", "billing", "MigrationSettings"),
        ("chat-migrate", "chat", "MigrationSettings"),
        ("prices", "billing", "DatabaseSettings"),
    ],
)
def test_a_container_is_told_everything_that_its_settings_want(
    compose: Json, monkeypatch: pytest.MonkeyPatch, container: str, service: str, wanted: str
) -> None:
    for name in [name for name in os.environ if name.startswith(("TOLLGATE_", "OTEL_"))]:
        monkeypatch.delenv(name)
    for name, value in interpolated(compose["services"][container]["environment"]).items():
        monkeypatch.setenv(name, value)
    (settings,) = (s for s in settings_of(f"services.{service}.settings") if re.fullmatch(wanted, s.__name__))
    loaded = settings()
    for name, value in loaded.model_dump().items():
        if name.endswith("_listen"):
            assert value.startswith("0.0.0.0:"), f"{name}={value} is not reachable from other containers"


def test_only_migrations_know_the_owner_of_the_database(compose: Json) -> None:
    knowing = {n for n, s in compose["services"].items() if "TOLLGATE_DATABASE_URL" in s.get("environment", {})}
    assert knowing == {"auth-migrate", "billing-migrate", "chat-migrate"}


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    environment = tmp_path / ".env"
    lines = [f"{name}={value}" for name, value in SECRETS.items()]
    environment.write_text((ROOT / ".env.example").read_text() + "\n".join(lines) + "\n")
    command = ["docker-compose", "--env-file", str(environment), "config"]
    accepted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert accepted.returncode == 0, accepted.stderr
    environment.write_text((ROOT / ".env.example").read_text())
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode != 0
    assert "in .env" in refused.stderr


# The images


def dockerfile_stages() -> dict[str, list[str]]:
    """The instructions of each stage, those of the stages below it first."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    for line in text.splitlines():
        if start := re.match(r"FROM (\S+) AS (\S+)", line):
            stages[start[2]] = current = list(stages.get(start[1], []))
        elif line and not line.startswith(("#", "ARG")):
            current.append(line)
    return stages


def assemble(stage: str, into: Path) -> None:
    """Put the files into `into` that the image takes from the checkout."""
    for instruction in dockerfile_stages()[stage]:
        if match := re.fullmatch(r"COPY (?!--)(\S+) (\S+)", instruction):
            source, target = ROOT / match[1], into / match[2]
            if match[2].startswith("/"):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
            else:
                shutil.copy2(source, target)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_everything_that_its_service_imports(tmp_path: Path, service: str) -> None:
    assemble(service, tmp_path)
    program = f"import services.{service}.__main__, services.{service}.app, services.{service}.settings"
    run_isolated(program, tmp_path)
    assert {path.name for path in (tmp_path / "services").iterdir()} == {"__init__.py", service}


def test_the_seed_s_image_holds_the_seed(tmp_path: Path) -> None:
    assemble("seed", tmp_path)
    run_isolated("import deploy.unleash.seed", tmp_path)


def run_isolated(program: str, directory: Path) -> None:
    """With this environment's packages and the directory's code, nothing of the checkout's."""
    code = f"import sys; sys.path.insert(0, {str(directory)!r}); {program}"
    command = [sys.executable, "-I", "-B", "-c", code]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_no_image_of_ours_runs_as_root() -> None:
    stages = dockerfile_stages()
    for stage in (*SERVICES, "seed", "triton", "triton-gpu"):
        users = [instruction.split()[1] for instruction in stages[stage] if instruction.startswith("USER ")]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), stage


def test_the_engine_inside_triton_needs_nothing_that_its_image_lacks(tmp_path: Path) -> None:
    assemble("triton", tmp_path)
    assert any((tmp_path / "services/inference/backend").glob("*.py"))
    for path in tmp_path.rglob("*.py"):
        for name in imported_modules(path):
            if name.split(".")[0] in ("services", "shared", "deploy"):
                module = tmp_path / name.replace(".", "/")
                assert module.with_suffix(".py").exists() or module.is_dir(), f"{path.name} imports {name}"


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


# What watches


def declared_metrics() -> set[str]:
    """Every series name of ours: of shared/telemetry.py, and of the engine inside Triton."""
    registry = CollectorRegistry()
    members: Mapping[str, Any] = vars(telemetry)
    for name, found in members.items():
        if inspect.isclass(found) and name.endswith("Metrics") and found.__module__ == telemetry.__name__:
            arguments = ["test"] if "service" in inspect.signature(found).parameters else []
            make: Any = found
            make(registry, *arguments)
    series = {metric.name: metric.type for metric in registry.collect()}
    for node in ast.parse((ROOT / "services/inference/backend/metrics.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            kind = {"GAUGES": "gauge", "COUNTERS": "counter", "HISTOGRAMS": "histogram"}.get(node.targets[0].id)
            if kind and isinstance(node.value, ast.Dict):
                for key in node.value.keys:
                    assert isinstance(key, ast.Constant)
                    assert isinstance(key.value, str)
                    series[f"tollgate_engine_{key.value}".removesuffix("_total")] = kind
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + suffix for name, kind in series.items() for suffix in suffixes.get(kind, ("",))}


def rule_groups() -> list[Json]:
    groups: list[Json] = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    return groups


def dashboards() -> dict[str, Json]:
    return {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}


def expressions() -> Iterator[tuple[str, str]]:
    """Where an expression stands, and the expression."""
    for group in rule_groups():
        for rule in group["rules"]:
            yield f"rule {rule.get('alert') or rule['record']}", rule["expr"]
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            yield f"{name}: ${variable['name']}", variable["definition"]


def test_every_metric_that_is_watched_is_one_that_is_made() -> None:
    declared = declared_metrics()
    recorded = {rule["record"] for group in rule_groups() for rule in group["rules"] if "record" in rule}
    seen = 0
    for place, expression in expressions():
        for name in re.findall(r"\btollgate_[a-z0-9_]+\b", expression):
            assert name in declared, f"{place}: {name}"
            seen += 1
        for name in re.findall(r"\btollgate:[a-z0-9_:]+\b", expression):
            assert name in recorded, f"{place}: {name}"
    assert seen > 50


def test_dashboards_are_well_formed_and_use_the_provisioned_sources() -> None:
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/datasources.yml").read_text())
    sources = {source["uid"] for source in provisioned["datasources"]}
    for name, dashboard in dashboards().items():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids)), name
        for panel in dashboard["panels"]:
            assert panel["type"] == "row" or panel["datasource"]["uid"] in sources
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]


def test_every_service_is_scraped_where_it_listens(compose: Json) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    scraped = {
        job["job_name"]: (source["names"], source["port"])
        for job in config["scrape_configs"]
        for source in job.get("dns_sd_configs", [])
    }
    for service in SERVICES:
        environment = compose["services"][service]["environment"]
        variable = "GATEWAY_INTERNAL" if service == "gateway" else f"{service.upper()}_HTTP"
        port = int(environment[f"TOLLGATE_{variable}_LISTEN"].rpartition(":")[2])
        assert scraped[service] == ([service], port)
    assert scraped["triton"] == (["triton"], 8002)


@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "config", "deploy/prometheus/prometheus.yml"),
        ("promtool", "test", "rules", "deploy/prometheus/rules_test.yml"),
        ("amtool", "check-config", "deploy/prometheus/alertmanager.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_own_tools_accept_the_configuration(command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
