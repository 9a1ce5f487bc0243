"""What a worker writes on the jobs that it holds without changing their state: leases, progress, checkpoints.

Every write names the fencing token; a row that does not match belongs to another attempt by now.
"""

from typing import Any, NamedTuple
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import Case, Q, When

from core.failpoints import side_effect
from jobs.database_clock import after
from jobs.errors import LeaseLost
from jobs.models import Job
from jobs.status import JobKind


class Renewal(NamedTuple):
    """What the database said about the jobs that a process holds."""

    fenced: set[UUID]
    """Held by another attempt, or ended."""
    cancelled: set[UUID]
    """Somebody asked to stop them."""
    yielding: set[UUID]
    """Interactive work waits for their place."""


def lease_seconds(kind: str) -> float:
    """How long a silent worker keeps a job of this kind. Short where somebody waits for it."""
    longest = float(settings.LORASITE["LEASE_SECONDS"])
    return min(longest, settings.LORASITE["GENERATE_LEASE_SECONDS"]) if kind == JobKind.GENERATE else longest


def leases_renew(holds: dict[UUID, int], progress: dict[UUID, dict[str, Any]] | None = None) -> Renewal:
    """Renew the leases of one process and carry its progress.

    Args:
        holds: {job id: token} of everything that the process works on.
        progress: {job id: columns} to write on the way (stage, progress_step, progress_total, figures).
    """
    if not holds:
        return Renewal(set(), set(), set())
    with side_effect("lease.commit"), transaction.atomic():
        mine = Q(pk__in=[])
        for job_id, token in holds.items():
            mine |= Q(pk=job_id, token=token)
        with side_effect("lease.renew"):
            Job.objects.leased().filter(mine).update(lease_until=_renewed_until())
        for job_id, columns in (progress or {}).items():
            with side_effect("lease.write_progress"):
                Job.objects.leased().filter(pk=job_id, token=holds.get(job_id, -1)).update(**columns)
        kept = list(Job.objects.leased().filter(mine).values_list("pk", "cancel_requested_at", "yield_requested_at"))
    return Renewal(
        fenced=set(holds) - {job_id for job_id, _, _ in kept},
        cancelled={job_id for job_id, cancel, _ in kept if cancel is not None},
        yielding={job_id for job_id, _, wish in kept if wish is not None},
    )


def _renewed_until() -> Case:
    """SQL: the end of a lease of the row's kind that begins now."""
    interactive = When(kind=JobKind.GENERATE, then=after(lease_seconds(JobKind.GENERATE)))
    return Case(interactive, default=after(settings.LORASITE["LEASE_SECONDS"]))


def checkpoint_record(*, job_id: UUID, token: int, step: int, files: dict[str, str]) -> None:
    """Point the job to its newest stored checkpoint.

    Raises:
        LeaseLost: This attempt no longer holds the job.
    """
    with side_effect("checkpoint.record"):
        updated = (
            Job.objects.leased()
            .filter(pk=job_id, token=token)
            .update(checkpoint=files, checkpoint_step=step, barren_losses=0)
        )
    if not updated:
        raise LeaseLost(f"job {job_id} is no longer held with token {token}: the checkpoint at step {step} is dropped")
