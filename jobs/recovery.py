"""What crashes and lateness leave behind, put right: expired leases, jobs past their time. Called by the dispatcher."""

from collections.abc import Sequence

from django.conf import settings
from django.db.models import Q
from django.db.models.functions import Now

from jobs import lifecycle
from jobs.database_clock import after
from jobs.leases import lease_seconds
from jobs.models import Job
from jobs.status import JobState

PER_SWEEP = 200
"""Rows that one sweep handles at most; the next one comes a second later."""


def expired_leases_requeue(*, kinds: Sequence[str] | None = None) -> int:
    """Close every attempt whose lease ran out; the job goes back to the queue, ends as cancelled, or as poison.

    Returns:
        Number of leases closed.
    """
    expired = Job.objects.lease_expired()
    if kinds is not None:
        expired = expired.filter(kind__in=kinds)
    closed = 0
    for job in list(expired.select_related("worker")[:PER_SWEEP]):
        reason = f"worker {job.worker or 'gone'} was not heard for {lease_seconds(job.kind):g} s"
        closed += lifecycle.job_lost(job=job, reason=reason) is not None
    return closed


def waiting_cancel() -> int:
    """QUEUED jobs whose cancel was asked while a worker held them become CANCELLED. Returns how many."""
    asked = Job.objects.filter(state=JobState.QUEUED, cancel_requested_at__isnull=False)
    return sum(lifecycle.job_cancel_waiting(job_id=pk) for pk in list(asked.values_list("pk", flat=True)[:PER_SWEEP]))


def queued_past_deadline_expire() -> int:
    """QUEUED jobs past their deadline, and jobs that never started in time, become EXPIRED. Returns how many."""
    never_started = Q(started_at__isnull=True, created_at__lt=after(-settings.LORASITE["QUEUE_SECONDS"]))
    late = Job.objects.filter(Q(deadline__lt=Now()) | never_started, state=JobState.QUEUED)
    return sum(
        lifecycle.job_expire(job_id=pk, reason="waited past its deadline")
        for pk in list(late.values_list("pk", flat=True)[:PER_SWEEP])
    )
