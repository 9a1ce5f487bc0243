"""The deployment files: no secret inside, nobody is root, the web tier never sees the broker."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasite.environment import REPOSITORY, Environment

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


def test_in_compose_only_dispatcher_and_workers_know_the_broker(compose: dict[str, Any]) -> None:
    knows = {name for name, service in compose["services"].items() if "BROKER" in json.dumps(service)}
    assert knows == {"dispatch", "worker-cpu", "worker-gpu"}
    assert compose["services"]["web"]["ports"] == ["127.0.0.1:8000:8000"]
    assert not [name for name in ("postgres", "valkey", "seaweedfs") if "ports" in compose["services"][name]]


def test_compose_takes_every_secret_from_outside_and_refuses_to_start_without(compose: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    for name in ("LORASITE_SECRET_KEY", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"):
        assert f"${{{name}:?" in text
    assert "requirepass ${VALKEY_PASSWORD}" in compose["configs"]["valkey"]["content"]
    assert "maxmemory-policy noeviction" in compose["configs"]["valkey"]["content"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_run_as_a_user_and_only_the_web_unit_has_no_broker(unit: Path) -> None:
    text = unit.read_text()
    assert "User=lorasite\n" in text
    assert "NoNewPrivileges=yes\n" in text
    assert ("broker.env" in text) == ("web" not in unit.name)
    assert not re.search(r"Exec\w+=.*\b(sh|bash) ", text)


def test_in_kubernetes_only_dispatcher_and_workers_know_the_broker(fleet: dict[str, dict[str, Any]]) -> None:
    knows = {name for name, document in fleet.items() if "lorasite-broker" in json.dumps(document)}
    assert knows == {f"Deployment lorasite-{part}" for part in ("dispatch", "worker-cpu", "worker-gpu")}
    for name, document in fleet.items():
        if "template" in document["spec"]:
            assert document["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_variables_that_exist_are_named(path: Path) -> None:
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
