"""Liveness and readiness. `/readyz` says in one object what is wrong; it never shows secrets."""

import logging
import shutil

from django.conf import settings
from django.db import DatabaseError, connection
from django.db.models import Count
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_safe

from jobs.dispatch import LEADER_STALE_SECONDS, leader
from jobs.status import WorkerState
from jobs.workers import live_workers

logger = logging.getLogger(__name__)


@require_safe
def healthz(request: HttpRequest) -> JsonResponse:
    """The process answers. Nothing else is looked at, so that a database outage restarts nobody."""
    return JsonResponse({"status": "ok"})


@require_safe
def readyz(request: HttpRequest) -> JsonResponse:
    """200 when requests can be served and jobs will run; 503 with the reasons otherwise."""
    problems: list[str] = []
    workers: dict[str, int] = {}
    dispatcher: dict[str, object] | None = None
    try:
        connection.ensure_connection()
        leads = leader()
        if leads is None:
            problems.append("no dispatcher has run yet: start `manage.py dispatch`")
        else:
            dispatcher = {"leader": leads.holder, "heard_seconds_ago": round(leads.age_seconds, 1)}
            if leads.age_seconds > LEADER_STALE_SECONDS:
                problems.append(
                    f"the dispatcher was last heard {leads.age_seconds:.0f} s ago: jobs wait, "
                    "start `manage.py dispatch`"
                )
        workers = dict(live_workers().values_list("state").annotate(Count("id")).order_by())
        if not workers.get(WorkerState.READY):
            problems.append("no worker is ready: start `celery -A lorasite worker -Q gpu,cpu`")
    except DatabaseError:
        logger.exception("readiness: database check failed")
        problems.append("the database does not answer")
    free_bytes = _free_disk_bytes()
    if free_bytes < 2**30:
        problems.append(f"only {free_bytes // 2**20} MiB are free in the data folder")
    status = "ok" if not problems else "degraded"
    body = {"status": status, "problems": problems, "workers": workers, "dispatcher": dispatcher}
    return JsonResponse(body, status=200 if not problems else 503)


def _free_disk_bytes() -> int:
    return shutil.disk_usage(settings.LORASITE["DATA"]).free
