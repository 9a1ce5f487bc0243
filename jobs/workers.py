"""Worker processes in the database: registration, readiness, and which of them are alive."""

import os
import socket
from collections.abc import Sequence
from uuid import UUID

from django.conf import settings
from django.db.models import QuerySet
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.database_clock import after
from jobs.models import WorkerProcess
from jobs.models.job import SPEC_VERSION
from jobs.status import WorkerState


def live_workers() -> QuerySet[WorkerProcess]:
    """Workers heard within the last lease."""
    return WorkerProcess.objects.filter(heartbeat_at__gt=after(-settings.LORASITE["LEASE_SECONDS"])).exclude(
        state=WorkerState.GONE
    )


def worker_register(*, queues: Sequence[str], device: str) -> WorkerProcess:
    """A row for this process, in state STARTING."""
    with side_effect("worker.register"):
        return WorkerProcess.objects.create(
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=list(queues),
            device=device,
            heartbeat_at=Now(),
            spec_version=SPEC_VERSION,
        )


def worker_ready(*, worker: WorkerProcess, warm_bases: Sequence[str]) -> None:
    """STARTING → READY, with the fingerprints that it keeps loaded."""
    worker.state, worker.warm_bases = WorkerState.READY, list(warm_bases)
    with side_effect("worker.ready"):
        WorkerProcess.objects.filter(pk=worker.pk).update(
            state=WorkerState.READY, warm_bases=list(warm_bases), heartbeat_at=Now()
        )


def worker_beat(*, worker: WorkerProcess, warm_bases: Sequence[str]) -> None:
    """Say that this process lives, and which bases are loaded now."""
    worker.warm_bases = list(warm_bases)
    with side_effect("worker.beat"):
        WorkerProcess.objects.filter(pk=worker.pk).update(warm_bases=list(warm_bases), heartbeat_at=Now())


def worker_gone(*, worker: WorkerProcess) -> None:
    """The process ends in good order."""
    with side_effect("worker.gone"):
        WorkerProcess.objects.filter(pk=worker.pk).update(state=WorkerState.GONE, heartbeat_at=Now())


def silent_workers_mark_gone() -> int:
    """Workers whose heartbeat is older than two leases become GONE. Returns how many."""
    silent = WorkerProcess.objects.filter(heartbeat_at__lt=after(-2 * settings.LORASITE["LEASE_SECONDS"]))
    with side_effect("worker.mark_silent"):
        return silent.exclude(state=WorkerState.GONE).update(state=WorkerState.GONE)


def worker_died(*, worker_id: UUID) -> bool:
    """A process that was found dead becomes GONE; False when that was known."""
    with side_effect("worker.mark_dead"):
        known = WorkerProcess.objects.filter(pk=worker_id).exclude(state=WorkerState.GONE)
        return bool(known.update(state=WorkerState.GONE))
