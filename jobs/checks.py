"""System checks: wrong settings are said at start, with an id and a hint."""

import sys
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, register

from jobs.leases import lease_seconds
from jobs.status import JobKind


@register()
def lease_outlives_heartbeat(**_: Any) -> list[CheckMessage]:
    """Two renewals may get lost before a lease runs out."""
    lease, heartbeat = lease_seconds(JobKind.GENERATE), settings.LORASITE["HEARTBEAT_SECONDS"]
    if heartbeat * 3 <= lease:
        return []
    return [
        Error(
            f"LORASITE_HEARTBEAT_SECONDS is {heartbeat} but the shortest lease (LORASITE_LEASE_SECONDS, "
            f"LORASITE_GENERATE_LEASE_SECONDS) only {lease}",
            hint="Make the lease at least three heartbeats long, or jobs are taken from healthy workers.",
            id="jobs.E001",
        )
    ]


@register()
def secret_key_is_secret(**_: Any) -> list[CheckMessage]:
    """The known development key signs sessions that anybody could forge: it may serve this machine alone."""
    others = sorted(set(settings.ALLOWED_HOSTS) - {"localhost", "127.0.0.1", "[::1]", "testserver"})
    if not settings.SECRET_KEY.startswith("development-only-") or not others:
        return []
    return [
        Error(
            f"LORASITE_SECRET_KEY is not set, but the site answers to {', '.join(others)}",
            hint="Set it: python -c 'import secrets; print(secrets.token_urlsafe(64))'",
            id="jobs.E003",
        )
    ]


@register()
def python_is_patched(**_: Any) -> list[CheckMessage]:
    """CPython before 3.11.14 lacks fixes of its zip reader (CVE-2024-0450, CVE-2025-8291)."""
    floors = {(3, 11): 14, (3, 12): 12, (3, 13): 10, (3, 14): 1}
    floor = floors.get(sys.version_info[:2])
    if floor is None or sys.version_info[2] >= floor:
        return []
    version = ".".join(map(str, sys.version_info[:3]))
    return [
        checks.Warning(
            f"Python {version} lacks security fixes",
            hint=f"Use {sys.version_info[0]}.{sys.version_info[1]}.{floor} or newer in production.",
            id="jobs.W002",
        )
    ]
