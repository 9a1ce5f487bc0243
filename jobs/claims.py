"""Claiming: which waiting jobs this worker takes now, and taking them. The order itself is `jobs/scheduling.py`."""

from collections.abc import Sequence
from uuid import UUID

from django.db import connection, transaction

from core.failpoints import side_effect
from jobs.lifecycle import Claim, job_take
from jobs.models import Job, WorkerProcess
from jobs.queue import claimable_candidates, recent_owner_seconds
from jobs.recovery import expired_leases_requeue
from jobs.scheduling import claim_order


def job_claim(*, kinds: Sequence[str], worker: WorkerProcess) -> Claim | None:
    """Take the best claimable job of these kinds, or None.

    Expired leases go back to the queue first, so that lost work is found by the next claim and not only by the sweep.
    """
    expired_leases_requeue(kinds=kinds)
    for candidate in claim_order(
        claimable_candidates(kinds), owner_seconds=recent_owner_seconds(), warm_bases=frozenset(worker.warm_bases)
    ):
        claim = take(candidate.job_id, worker)
        if claim is not None:
            return claim
    return None


def take(job_id: UUID, worker: WorkerProcess) -> Claim | None:
    """Take this very job if it still waits."""
    with side_effect("claim.commit"), transaction.atomic():
        rows = Job.objects.claimable().filter(pk=job_id)
        if connection.features.has_select_for_update_skip_locked:
            # Another worker is claiming this very row: take the next one instead of waiting for it.
            rows = rows.select_for_update(skip_locked=True, of=("self",))
        job = rows.first()
        return None if job is None else job_take(job=job, worker=worker)
