"""Settings: production refuses weak values, the web tier needs no broker, `deploy/env.example` is complete."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from lorasite.env_example import env_example
from lorasite.environment import REPOSITORY, Environment

STRONG = "s" * 64


def interpreter(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that knows these settings only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORASITE_", "DJANGO_"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**kept, **variables}, capture_output=True, text=True
    )


def production(**variables: str) -> subprocess.CompletedProcess[str]:
    return interpreter("import lorasite.settings.production", **variables)


@pytest.mark.parametrize("secret", ["", "s" * 49], ids=["none", "49 characters"])
def test_production_refuses_a_short_secret_and_says_how_to_make_one(secret: str) -> None:
    done = production(LORASITE_SECRET_KEY=secret)
    assert done.returncode != 0
    assert f"LORASITE_SECRET_KEY has {len(secret)} characters, at least 50 are needed" in done.stderr
    assert "secrets.token_urlsafe(64)" in done.stderr


def test_production_refuses_debug_pages() -> None:
    done = production(LORASITE_SECRET_KEY=STRONG, LORASITE_DEBUG="true")
    assert done.returncode != 0
    assert "LORASITE_DEBUG is on: production settings refuse it" in done.stderr


def test_production_with_a_strong_secret_sends_cookies_over_tls_only() -> None:
    code = (
        "from lorasite.settings import production as p; "
        "assert p.SESSION_COOKIE_SECURE and p.CSRF_COOKIE_SECURE and p.SECURE_SSL_REDIRECT and not p.DEBUG"
    )
    done = interpreter(code, LORASITE_SECRET_KEY=STRONG)
    assert done.returncode == 0, done.stderr


def test_the_deployment_check_of_production_finds_no_error(tmp_path: Path) -> None:
    code = (
        "from django.core.management import execute_from_command_line as run; "
        "run(['manage.py', 'check', '--deploy', '--fail-level', 'ERROR'])"
    )
    variables = {"DJANGO_SETTINGS_MODULE": "lorasite.settings.production", "LORASITE_DATA": str(tmp_path)}
    done = interpreter(code, LORASITE_SECRET_KEY=secrets.token_urlsafe(64), **variables)
    assert done.returncode == 0, done.stderr
    assert "System check identified" in done.stdout + done.stderr


def test_the_web_process_loads_without_a_broker_and_without_torch() -> None:
    code = (
        "import sys, lorasite.asgi, django.urls; django.urls.reverse('admin:index'); "
        "from django.conf import settings; "
        "assert not [n for n in dir(settings) if 'BROKER' in n], dir(settings); "
        "assert 'torch' not in sys.modules; assert 'redis' not in str(settings.CACHES) + settings.SESSION_ENGINE"
    )
    done = interpreter(code, DJANGO_SETTINGS_MODULE="lorasite.settings.production", LORASITE_SECRET_KEY=STRONG)
    assert done.returncode == 0, done.stderr


def test_every_wrong_variable_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASITE_LEASE_SECONDS", "0")
    monkeypatch.setenv("LORASITE_STORAGE", "ftp")
    with pytest.raises(ValidationError) as caught:
        Environment()
    assert {error["loc"][0] for error in caught.value.errors()} == {"lease_seconds", "storage"}


@pytest.mark.parametrize("url", ["redis://broker.internal:6379/0", "redis://10.0.0.7/0", "rediss://user@10.0.0.7/0"])
def test_a_broker_that_others_can_reach_needs_a_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASITE_BROKER_URL", url)
    with pytest.raises(ValidationError, match="has no password"):
        Environment()


@pytest.mark.parametrize("url", ["", "redis://127.0.0.1:6379/0", "redis://:secret@broker.internal:6379/0"])
def test_a_guarded_or_local_broker_is_accepted_and_its_password_never_shown(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASITE_BROKER_URL", url)
    environment = Environment()
    assert environment.broker_url.get_secret_value() == url
    assert "secret@" not in repr(environment)


def test_the_example_names_every_variable_with_its_default_and_meaning() -> None:
    written = (REPOSITORY / "deploy" / "env.example").read_text()
    assert written == env_example(), "run: python -m lorasite.env_example > deploy/env.example"
    for name, field in Environment.model_fields.items():
        assert f"#LORASITE_{name.upper()}=" in written
        assert field.description, f"{name} has no description"
    assert "#LORASITE_LEASE_SECONDS=30.0\n" in written
    assert "#LORASITE_DATA=var\n" in written


def test_taking_the_marks_off_the_example_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in env_example().splitlines():
        if line.startswith("#LORASITE_"):
            name, value = line[1:].split("=", 1)
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPOSITORY)
    assert Environment().model_dump() == {
        **Environment.model_construct().model_dump(),
        "data": Environment().data,
    }
    assert Environment().data.resolve() == REPOSITORY / "var"
