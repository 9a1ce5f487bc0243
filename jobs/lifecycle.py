"""The writer of job states after the claim: guarded updates with a fencing token, an event in the same transaction.

A worker's write names the token that its claim returned; when the row does not match, the attempt is fenced and
`LeaseLost` is raised. Claims are written by `jobs/taking.py`, what crashed is found by `jobs/recovery.py`.
"""

import logging
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import BigIntegerField, CharField, F, Q, UUIDField
from django.db.models.functions import Now
from django.db.models.sql import InsertQuery

from core.failpoints import side_effect
from jobs.database_clock import after
from jobs.errors import Conflict, InvalidTransition, LeaseLost
from jobs.models import Job, JobAttempt, JobEvent
from jobs.prepared_sql import Parameter, Run, Write, insert_of, send
from jobs.status import LEASED, TERMINAL, TRANSITIONS, AttemptOutcome, JobKind, JobState, sources_of
from jobs.usage import usage_add
from jobs.wakeup import announce

logger = logging.getLogger(__name__)

MAX_BARREN_LOSSES = 3
"""Losses in a row without checkpoint progress until a job counts as poison."""


def job_created(job: Job) -> None:
    """Record the birth of a job; call in the transaction that inserted it."""
    with side_effect("job.created"):
        JobEvent.objects.create(job=job, at=Now(), old_state="", new_state=JobState.QUEUED, token=0, reason="submitted")


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
    error: dict[str, Any] = {"error_code": code, "error_message": message, "error_traceback": traceback}
    with transaction.atomic():
        _change(job_id, JobState.FAILED, token=token, reason=f"{code}: {message}", **error)
        _close_attempt(job_id, token, AttemptOutcome.FAILED, message)


def job_release(
    *,
    job_id: UUID,
    token: int,
    reason: str,
    outcome: AttemptOutcome = AttemptOutcome.RELEASED,
    delay_seconds: float = 0.0,
    **columns: Any,
) -> None:
    """RUNNING or UPLOADING → QUEUED on the worker's own wish: neither a loss nor a failure of the job.

    Args:
        outcome: How this try is remembered.
        delay_seconds: Not claimed again before this time has passed.
        columns: Further columns of the job to write, such as a counter of its retries.

    Raises:
        LeaseLost: Fenced.
    """
    columns |= {"not_before": after(delay_seconds) if delay_seconds else None, "queued_at": Now()}
    with transaction.atomic():
        _change(job_id, JobState.QUEUED, token=token, reason=reason, stage="waiting to go on", **columns)
        _close_attempt(job_id, token, outcome, reason)
        if not delay_seconds:
            announce()


def job_preempted(*, job_id: UUID, token: int, reason: str) -> None:
    """RUNNING → QUEUED to make room for interactive work; counts neither as a try nor as a loss. Raises LeaseLost."""
    job_release(
        job_id=job_id,
        token=token,
        reason=f"preempted: {reason}",
        outcome=AttemptOutcome.PREEMPTED,
        yielded_at=Now(),
        yield_requested_at=None,
        attempts_count=F("attempts_count") - 1,
    )


def job_lost(
    *, job: Job, reason: str, outcome: AttemptOutcome = AttemptOutcome.LOST, only_expired: bool = True
) -> JobState | None:
    """This try is gone: back to the queue, CANCELLED where that was asked, FAILED(poison) at the third barren loss.

    Args:
        job: As it was read; its token guards the write.
        only_expired: The lease must have run out by the database's clock. False: the holder itself gives up.

    Returns:
        The new state; None when the job was renewed or ended in the meantime.
    """
    # Whoever came to storing has computed well: that the process died then is no sign against the job.
    barren = job.barren_losses + (job.state != JobState.UPLOADING)
    where = Q(lease_until__lt=Now()) if only_expired else Q()
    target = JobState.QUEUED
    columns: dict[str, Any] = {"barren_losses": barren, "queued_at": Now(), "stage": "waiting to go on"}
    if job.cancel_requested_at is not None:
        target, columns = JobState.CANCELLED, {"stage": ""}
    elif barren >= MAX_BARREN_LOSSES:
        message = (
            f"The job took its worker down {barren} times without any progress, so it is not tried again. "
            "Change its settings (smaller pictures, smaller batch), or ask an operator for the worker's log."
        )
        target = JobState.FAILED
        columns = {"barren_losses": barren, "error_code": "poison", "error_message": message}
    told = {JobState.CANCELLED: "cancelled; ", JobState.FAILED: "poison: "}.get(target, "lost: ") + reason
    try:
        with transaction.atomic():
            _change(job.pk, target, token=job.token, where=where, reason=told, **columns)
            _close_attempt(job.pk, job.token, outcome, reason)
            if target == JobState.QUEUED:
                announce(job.kind)
    except LeaseLost:
        return None
    return target


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
    if job_cancel_waiting(job_id=job.pk):
        return JobState.CANCELLED
    # A worker holds it, or claimed it this very moment: ask that worker. Should it give the job back first, the
    # dispatcher's sweep ends it.
    with side_effect("job.ask_cancel"):
        asked = Job.objects.active().filter(pk=job.pk).update(cancel_requested_at=Now())
    state = JobState(Job.objects.values_list("state", flat=True).get(pk=job.pk))
    if not asked:
        raise Conflict(f"this job has already ended ({state.label.lower()}); nothing to cancel")
    logger.info("job cancel requested id=%s state=%s", job.pk, state)
    return state


def job_expire(*, job_id: UUID, reason: str) -> bool:
    """QUEUED → EXPIRED; False when it no longer waits."""
    return _end_waiting(job_id, JobState.EXPIRED, reason)


def job_cancel_waiting(*, job_id: UUID) -> bool:
    """QUEUED → CANCELLED; False when it does not wait."""
    return _end_waiting(job_id, JobState.CANCELLED, "cancelled while waiting")


def _end_waiting(job_id: UUID, target: JobState, reason: str) -> bool:
    try:
        with transaction.atomic():
            _change(job_id, target, sources={JobState.QUEUED}, reason=reason, stage="")
    except LeaseLost:
        return False
    return True


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
    changed = 0
    if old is not None:
        if target not in LEASED:
            columns |= {"lease_until": None, "worker": None}
        if target in TERMINAL:
            columns |= {"finished_at": Now()}
        with side_effect("job.change"):
            changed = row.filter(state=old[0], token=old[1]).update(state=target, **columns)
    if old is None or not changed:
        raise LeaseLost(
            f"job {job_id} could not become {target}: it ended, or another attempt holds it (token {token})"
        )
    _record(job_id, JobState(old[0]), target, old[1], reason)


def _close_attempt(job_id: UUID, token: int, outcome: AttemptOutcome, reason: str) -> None:
    job = Job.objects.get(pk=job_id)
    # What this try leaves behind: of a training, the step that the next try goes on from.
    to_step = job.checkpoint_step if job.kind == JobKind.TRAIN else job.progress_step
    row = JobAttempt.objects.filter(job_id=job_id, token=token)
    with side_effect("attempt.close"):
        row.filter(ended_at__isnull=True).update(ended_at=Now(), outcome=outcome, reason=reason, to_step=to_step)
    attempt = row.get()
    if attempt.ended_at is not None:
        seconds = max(0.0, (attempt.ended_at - attempt.started_at) / timedelta(seconds=1))
        with side_effect("job.count_seconds"):
            Job.objects.filter(pk=job_id).update(used_worker_seconds=F("used_worker_seconds") + seconds)
        usage_add(owner_id=job.owner_id, worker_seconds=seconds)


def _record(job_id: UUID, old: JobState, new: JobState, token: int, reason: str) -> None:
    with side_effect("job.record"):
        send(_event_of(job_id, old, new, token, reason))
    logger.info("job id=%s %s→%s token=%s reason=%s", job_id, old, new, token, reason)


def _event_of(job_id: UUID, old: JobState, new: JobState, token: int, reason: str) -> Run:
    return _EVENT.run(job_id=job_id, old_state=old, new_state=new, token=token, reason=reason[:300])


_JOB_ID = Parameter("job_id", UUIDField())
_TOKEN = Parameter("token", BigIntegerField())


def _event() -> InsertQuery:
    brought: dict[str, Any] = {"job_id": _JOB_ID, "token": _TOKEN}
    brought |= {name: Parameter(name, CharField()) for name in ("old_state", "new_state", "reason")}
    return insert_of(JobEvent(at=Now(), **brought))


_EVENT = Write(_event)
