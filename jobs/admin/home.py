"""The admin's first page: what is wrong, what runs and waits, what failed last."""

from datetime import datetime
from typing import Any

from django.contrib import admin
from django.db.models import Count, Min, Q, QuerySet, Sum
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone

from jobs.admin.readonly import duration, record_link, state_label
from jobs.dispatch import LEADER_STALE_SECONDS, leader
from jobs.models import BaseModel, Job, LeaderLease, User, WorkerProcess
from jobs.status import ACTIVE, JobState, WorkerState
from jobs.usage import decayed
from jobs.workers import live_workers

SHOWN_JOBS = 8
SHOWN_PEOPLE = 8

admin.site.index_template = "jobs/admin/home.html"
admin.site.index_title = "Overview"


def home_context(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Adds the home page's figures for those who may see jobs."""
    if request.user.has_perm("jobs.view_job"):
        context |= {"problems": _problems(), "counts": _counts(), "tables": [*_lines(), *_tables()]}
    return context


def _problems() -> list[str]:
    """Sentences about what keeps jobs from running; empty when all is well."""
    problems = []
    leads = leader()
    if leads is None:
        problems.append("No dispatcher has run yet: jobs wait. Start `manage.py dispatch`.")
    elif leads.age_seconds > LEADER_STALE_SECONDS:
        problems.append(
            f"The dispatcher was last heard {leads.age_seconds:.0f} s ago: jobs wait. Start `manage.py dispatch`."
        )
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


def _lines() -> list[dict[str, Any]]:
    """The waiting line by kind and by person, and who leads the dispatchers."""
    now = timezone.now()
    active = Job.objects.filter(state__in=ACTIVE).order_by()
    waits = Count("pk", filter=Q(state=JobState.QUEUED))
    work = Sum("estimated_seconds", filter=Q(state=JobState.QUEUED), default=0.0)
    since = Min("queued_at", filter=Q(state=JobState.QUEUED))
    kinds = (
        active.values("kind")
        .annotate(waiting=waits, both=Count("pk"), work=work, since=since)
        .values_list("kind", "waiting", "both", "work", "since")
        .order_by("kind")
    )
    people = User.objects.filter(jobs__state=JobState.QUEUED).annotate(
        waiting=Count("jobs"), work=Sum("jobs__estimated_seconds"), since=Min("jobs__queued_at")
    )
    leaders = LeaderLease.objects.order_by("role")
    return [
        {
            "title": "Waiting by kind of work",
            "empty": "Nothing waits.",
            "rows": [
                [
                    kind,
                    f"{waiting} waiting",
                    f"{both - waiting} held by workers",
                    f"about {duration(seconds)} of work",
                    f"the oldest for {duration((now - oldest).total_seconds())}" if oldest else "-",
                ]
                for kind, waiting, both, seconds, oldest in kinds
            ],
        },
        {
            "title": "Who waits",
            "empty": "Nobody waits.",
            "rows": [
                [
                    record_link(person),
                    f"{person.waiting} waiting",
                    f"about {duration(person.work)} of work",
                    f"for {duration((now - person.since).total_seconds())}",
                    f"weight {person.scheduling_weight:g}, used {_used(person, now)} lately",
                ]
                for person in people.select_related("usage").order_by("since")[:SHOWN_PEOPLE]
            ],
        },
        {
            "title": "Who leads",
            "empty": "No dispatcher has run yet.",
            "rows": [
                [lease.role, lease.holder or "nobody", f"heard {duration((now - lease.beat_at).total_seconds())} ago"]
                for lease in leaders
            ],
        },
    ]


def _used(person: User, now: datetime) -> str:
    usage = getattr(person, "usage", None)
    return "nothing" if usage is None else duration(decayed(usage.worker_seconds, usage.as_of, now))


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
