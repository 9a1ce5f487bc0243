"""The only writer of job states: guarded updates with a fencing token, an event in the same transaction.

A worker's write names the token that its claim returned; when the row does not match, the attempt is fenced and
`LeaseLost` is raised.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from jobs.database_clock import after
from jobs.errors import Conflict, InvalidTransition, LeaseLost
from jobs.models import Job, JobAttempt, JobEvent, WorkerProcess
from jobs.queue import claimable_candidates, recent_owner_seconds
from jobs.scheduling import claim_order
from jobs.status import LEASED, TERMINAL, TRANSITIONS, AttemptOutcome, JobKind, JobState, sources_of

logger = logging.getLogger(__name__)

MAX_BARREN_LOSSES = 3
"""Losses in a row without checkpoint progress until a job counts as poison."""


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds, and the token that proves it."""

    job: Job
    token: int


def job_claim(*, kinds: Sequence[str], worker: WorkerProcess) -> Claim | None:
    """Take the best claimable job of these kinds, or None.

    Expired leases go back to the queue first, so that lost work is found by the next claim and not only by the sweep.
    """
    expired_leases_requeue(kinds=kinds)
    for candidate in claim_order(
        claimable_candidates(kinds), owner_seconds=recent_owner_seconds(), warm_bases=frozenset(worker.warm_bases)
    ):
        claim = _try_claim(candidate.job_id, worker)
        if claim is not None:
            return claim
    return None


@transaction.atomic
def _try_claim(job_id: UUID, worker: WorkerProcess) -> Claim | None:
    rows = Job.objects.claimable().filter(pk=job_id)
    if connection.features.has_select_for_update_skip_locked:
        # Another worker is claiming this very row: take the next one instead of waiting for it.
        rows = rows.select_for_update(skip_locked=True, of=("self",))
    job = rows.first()
    if job is None:
        return None
    token = job.token + 1
    claimed = (
        Job.objects.claimable()
        .filter(pk=job_id, token=job.token)
        .update(
            state=JobState.RUNNING,
            token=token,
            worker=worker,
            lease_until=after(settings.LORASITE["LEASE_SECONDS"]),
            attempts_count=F("attempts_count") + 1,
            started_at=job.started_at or Now(),
            stage="starting",
        )
    )
    if not claimed:
        return None
    JobAttempt.objects.create(
        job=job, token=token, worker=worker, worker_name=str(worker), started_at=Now(), from_step=job.checkpoint_step
    )
    _record(job_id, JobState.QUEUED, JobState.RUNNING, token, f"claimed by {worker}")
    job.refresh_from_db()
    return Claim(job, token)


def job_uploading(*, job_id: UUID, token: int) -> None:
    """RUNNING → UPLOADING: everything is computed, storing begins. Raises LeaseLost when fenced."""
    with transaction.atomic():
        _change(job_id, JobState.UPLOADING, token=token, reason="results computed", stage="storing results")


def job_succeed(*, job_id: UUID, token: int) -> None:
    """UPLOADING → SUCCEEDED, inside the transaction that makes the results visible. Raises LeaseLost when fenced."""
    _change(job_id, JobState.SUCCEEDED, token=token, reason="results are visible", stage="")
    _close_attempt(job_id, token, AttemptOutcome.SUCCEEDED, "")


def job_fail(*, job_id: UUID, token: int, code: str, message: str, traceback: str = "") -> None:
    """RUNNING or UPLOADING → FAILED with a code and a sentence. Raises LeaseLost when fenced."""
    with transaction.atomic():
        _change(
            job_id,
            JobState.FAILED,
            token=token,
            reason=f"{code}: {message}",
            error_code=code,
            error_message=message,
            error_traceback=traceback,
        )
        _close_attempt(job_id, token, AttemptOutcome.FAILED, message)


def job_release(*, job_id: UUID, token: int, reason: str, delay_seconds: float = 0.0) -> None:
    """RUNNING or UPLOADING → QUEUED on the worker's own wish: no loss, no failure. Raises LeaseLost when fenced."""
    with transaction.atomic():
        _change(
            job_id,
            JobState.QUEUED,
            token=token,
            reason=reason,
            stage="waiting to go on",
            not_before=after(delay_seconds) if delay_seconds else None,
        )
        _close_attempt(job_id, token, AttemptOutcome.RELEASED, reason)


def job_cancelled(*, job_id: UUID, token: int) -> None:
    """RUNNING or UPLOADING → CANCELLED, by the worker that stopped. Raises LeaseLost when fenced."""
    with transaction.atomic():
        _change(job_id, JobState.CANCELLED, token=token, reason="stopped on request", stage="")
        _close_attempt(job_id, token, AttemptOutcome.CANCELLED, "stopped on request")


def job_cancel(*, job: Job) -> JobState:
    """Somebody wants the job gone. Returns the state afterwards.

    Queued jobs end at once, with or without workers; held ones stop at their next step, or at lease expiry if the
    worker is dead.

    Raises:
        Conflict: The job has ended already.
    """
    with transaction.atomic():
        if Job.objects.filter(pk=job.pk, state=JobState.QUEUED).exists():
            try:
                _change(
                    job.pk, JobState.CANCELLED, sources={JobState.QUEUED}, reason="cancelled while waiting", stage=""
                )
            except LeaseLost:
                pass  # A worker claimed it between the two statements: ask that worker instead.
            else:
                return JobState.CANCELLED
        asked = Job.objects.active().filter(pk=job.pk).update(cancel_requested_at=Now())
    state = JobState(Job.objects.values_list("state", flat=True).get(pk=job.pk))
    if not asked:
        raise Conflict(f"this job has already ended ({state.label.lower()}); nothing to cancel")
    logger.info("job cancel requested id=%s state=%s", job.pk, state)
    return state


def expired_leases_requeue(*, kinds: Sequence[str] | None = None) -> int:
    """Close every attempt whose lease ran out; the job goes back to the queue, ends as cancelled, or as poison.

    Returns:
        Number of leases closed.
    """
    expired = Job.objects.lease_expired()
    if kinds is not None:
        expired = expired.filter(kind__in=kinds)
    closed = 0
    for job in list(expired[:100]):
        closed += _lose(job)
    return closed


def _lose(job: Job) -> bool:
    barren = job.barren_losses + 1
    reason = f"worker {job.worker or 'gone'} was not heard for {settings.LORASITE['LEASE_SECONDS']:g} s"
    still_expired = Q(lease_until__lt=Now())
    try:
        with transaction.atomic():
            if job.cancel_requested_at is not None:
                _change(job.pk, JobState.CANCELLED, token=job.token, where=still_expired, reason="cancelled; " + reason)
            elif barren >= MAX_BARREN_LOSSES:
                message = (
                    f"The job took its worker down {barren} times without any progress, so it is not tried again. "
                    "Change its settings (smaller pictures, smaller batch), or ask an operator for the worker's log."
                )
                _change(
                    job.pk,
                    JobState.FAILED,
                    token=job.token,
                    where=still_expired,
                    reason="poison: " + reason,
                    error_code="poison",
                    error_message=message,
                    barren_losses=barren,
                )
            else:
                _change(
                    job.pk,
                    JobState.QUEUED,
                    token=job.token,
                    where=still_expired,
                    reason="lost: " + reason,
                    stage="waiting to go on",
                    barren_losses=barren,
                )
            _close_attempt(job.pk, job.token, AttemptOutcome.LOST, reason)
    except LeaseLost:
        return False  # Renewed or closed by somebody else in the meantime.
    return True


def queued_past_deadline_expire() -> int:
    """QUEUED jobs past their deadline become EXPIRED. Returns how many."""
    late = Job.objects.filter(state=JobState.QUEUED, deadline__lt=Now())
    expired = 0
    for job_id in list(late.values_list("pk", flat=True)[:100]):
        with transaction.atomic():
            try:
                _change(
                    job_id, JobState.EXPIRED, sources={JobState.QUEUED}, reason="waited past its deadline", stage=""
                )
            except LeaseLost:
                continue
        expired += 1
    return expired


def job_created(job: Job) -> None:
    """Record the birth of a job; call in the transaction that inserted it."""
    JobEvent.objects.create(job=job, at=Now(), old_state="", new_state=JobState.QUEUED, token=0, reason="submitted")


def _change(
    job_id: UUID,
    target: JobState,
    *,
    token: int | None = None,
    sources: set[JobState] | None = None,
    where: Q | None = None,
    reason: str,
    **columns: Any,
) -> None:
    """The one guarded UPDATE. Must run inside a transaction.

    Raises:
        InvalidTransition: The table knows no way from `sources` to `target`.
        LeaseLost: No row matched: another attempt holds the job, or it has ended.
    """
    allowed = frozenset(sources) if sources is not None else sources_of(target) & LEASED
    if any(target not in TRANSITIONS[source] for source in allowed) or not allowed:
        raise InvalidTransition(f"no job may go from {sorted(allowed)} to {target}")
    row = Job.objects.filter(where or Q(), pk=job_id, state__in=allowed)
    if token is not None:
        row = row.filter(token=token)
    old = row.values_list("state", "token").first()
    if old is not None:
        if target not in LEASED:
            columns |= {"lease_until": None, "worker": None}
        if target in TERMINAL:
            columns |= {"finished_at": Now()}
        row = row.filter(state=old[0], token=old[1])
    if old is None or not row.update(state=target, **columns):
        raise LeaseLost(
            f"job {job_id} could not become {target}: it ended, or another attempt holds it (token {token})"
        )
    _record(job_id, JobState(old[0]), target, old[1], reason)


def _close_attempt(job_id: UUID, token: int, outcome: AttemptOutcome, reason: str) -> None:
    job = Job.objects.get(pk=job_id)
    # What this try leaves behind: of a training, the step that the next try goes on from.
    to_step = job.checkpoint_step if job.kind == JobKind.TRAIN else job.progress_step
    row = JobAttempt.objects.filter(job_id=job_id, token=token)
    row.filter(ended_at__isnull=True).update(ended_at=Now(), outcome=outcome, reason=reason, to_step=to_step)
    attempt = row.get()
    if attempt.ended_at is not None:
        seconds = (attempt.ended_at - attempt.started_at) / timedelta(seconds=1)
        Job.objects.filter(pk=job_id).update(used_worker_seconds=F("used_worker_seconds") + max(0.0, seconds))


def _record(job_id: UUID, old: JobState, new: JobState, token: int, reason: str) -> None:
    JobEvent.objects.create(job_id=job_id, at=Now(), old_state=old, new_state=new, token=token, reason=reason[:300])
    logger.info("job id=%s %s→%s token=%s reason=%s", job_id, old, new, token, reason)
