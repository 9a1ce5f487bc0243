"""The admin's first page: what is wrong, what runs and waits, what failed last."""

from typing import Any

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.urls import reverse

from jobs.admin.readonly import record_link, state_label
from jobs.dispatch import leader_age_seconds
from jobs.models import BaseModel, Job, WorkerProcess
from jobs.status import ACTIVE, JobState, WorkerState
from jobs.workers import live_workers

SILENT_SECONDS = 30.0  # after which a dispatcher counts as gone
SHOWN_JOBS = 8

admin.site.index_template = "jobs/admin/home.html"
admin.site.index_title = "Overview"


def home_context(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Adds the home page's figures for those who may see jobs."""
    if request.user.has_perm("jobs.view_job"):
        context |= {"problems": _problems(), "counts": _counts(), "tables": _tables()}
    return context


def _problems() -> list[str]:
    """Sentences about what keeps jobs from running; empty when all is well."""
    problems = []
    age = leader_age_seconds()
    if age is None:
        problems.append("No dispatcher has run yet: jobs wait. Start `manage.py dispatch`.")
    elif age > SILENT_SECONDS:
        problems.append(f"The dispatcher was last heard {age:.0f} s ago: jobs wait. Start `manage.py dispatch`.")
    served = {queue for queues in _ready_workers().values_list("queues", flat=True) for queue in queues}
    for queue, work in (("gpu", "train, generate or prepare base models"), ("cpu", "prepare datasets")):
        if queue not in served:
            problems.append(f"No worker is ready to {work}. Start `celery -A lorasite worker -Q {queue}`.")
    if not BaseModel.objects.ready().exists():
        problems.append("No base model is ready: register one under Base models, and wait for its preparation.")
    return problems


def _counts() -> list[dict[str, Any]]:
    """Numbers with a link to their rows."""
    by_state = dict(Job.objects.values_list("state").annotate(Count("id")).order_by())
    jobs = reverse("admin:jobs_job_changelist")
    counts = [
        {"title": state.value, "number": by_state.get(state, 0), "link": f"{jobs}?state__exact={state.value}"}
        for state in JobState
    ]
    ready = {
        "title": "workers ready",
        "number": _ready_workers().count(),
        "link": reverse("admin:jobs_workerprocess_changelist"),
    }
    return [*counts, ready]


def _tables() -> list[dict[str, Any]]:
    active = Job.objects.filter(state__in=ACTIVE).order_by("-started_at", "created_at")
    failed = Job.objects.filter(state=JobState.FAILED).order_by("-finished_at")
    return [
        {
            "title": "Running and waiting",
            "empty": "Nothing runs and nothing waits.",
            "rows": [
                [record_link(job), job.owner, state_label(job.state), f"{job.progress_percent} %", job.stage or "-"]
                for job in _light(active)
            ],
        },
        {
            "title": "Failed last",
            "empty": "Nothing has failed.",
            "rows": [
                [record_link(job), job.owner, job.error_code, job.error_message[:160], job.finished_at]
                for job in _light(failed)
            ],
        },
    ]


def _light(jobs: QuerySet[Job]) -> QuerySet[Job]:
    return jobs.select_related("owner").defer("spec", "checkpoint", "error_traceback")[:SHOWN_JOBS]


def _ready_workers() -> QuerySet[WorkerProcess]:
    return live_workers().filter(state=WorkerState.READY)
