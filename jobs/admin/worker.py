"""Machines in the admin: worker processes and who leads the dispatchers."""

from django.conf import settings
from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin
from jobs.models import LeaderLease, WorkerProcess
from jobs.status import WorkerState


@admin.register(WorkerProcess)
class WorkerProcessAdmin(ReadOnlyAdmin):
    """Worker children: where, which queues, what they keep warm, when they were last heard."""

    list_display = [
        "__str__",
        "worker_state",
        "heard",
        "device",
        "queue_names",
        "warm_count",
        "held_count",
        "started_at",
    ]
    list_filter = ["state", "host"]
    search_fields = ["host", "pid"]
    readonly_fields = ["heard", "queue_names", "warm_count", "held_count"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[WorkerProcess]:
        """With the number of jobs that each holds."""
        return super().get_queryset(request).annotate(held=Count("held_jobs"))

    @display(
        description="State",
        ordering="state",
        label={"starting": "info", "ready": "success", "silent": "danger", "gone": ""},
    )
    def worker_state(self, worker: WorkerProcess) -> str:
        """As recorded; silent when its heartbeat is older than a lease."""
        silent = _seconds_since(worker) > settings.LORASITE["LEASE_SECONDS"]
        return "silent" if silent and worker.state != WorkerState.GONE else str(worker.state)

    @display(description="Last heard", ordering="heartbeat_at")
    def heard(self, worker: WorkerProcess) -> str:
        """Age of the heartbeat."""
        seconds = _seconds_since(worker)
        return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"

    @display(description="Queues")
    def queue_names(self, worker: WorkerProcess) -> str:
        """Queues as one text."""
        return ", ".join(worker.queues)

    @display(description="Warm bases")
    def warm_count(self, worker: WorkerProcess) -> int:
        """How many base models are loaded."""
        return len(worker.warm_bases)

    @display(description="Jobs held", ordering="held")
    def held_count(self, worker: WorkerProcess) -> int:
        """How many jobs it works on now."""
        return worker.held  # type: ignore[attr-defined]


@admin.register(LeaderLease)
class LeaderLeaseAdmin(ReadOnlyAdmin):
    """Who acts for a role; another takes over when the lease runs out."""

    list_display = ["role", "holder", "lease_until", "beat_at"]


def _seconds_since(worker: WorkerProcess) -> float:
    return max(0.0, (timezone.now() - worker.heartbeat_at).total_seconds())
