"""Wrong settings are said at start."""

from typing import Any

import pytest
from django.core.checks import run_checks


def ids() -> set[str]:
    return {message.id or "" for message in run_checks()}


def test_the_development_key_serves_this_machine_only(settings: Any) -> None:
    settings.SECRET_KEY = "development-only-" + "x" * 40
    settings.ALLOWED_HOSTS = ["localhost"]
    assert "jobs.E003" not in ids()
    settings.ALLOWED_HOSTS = ["localhost", "studio.example.com"]
    assert "jobs.E003" in ids()
    settings.SECRET_KEY = "y" * 60
    assert "jobs.E003" not in ids()


def test_a_lease_shorter_than_three_heartbeats_is_refused(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.LORASITE, "LEASE_SECONDS", 5.0)
    monkeypatch.setitem(settings.LORASITE, "HEARTBEAT_SECONDS", 2.0)
    assert "jobs.E001" in ids()
    monkeypatch.setitem(settings.LORASITE, "HEARTBEAT_SECONDS", 1.0)
    assert "jobs.E001" not in ids()
