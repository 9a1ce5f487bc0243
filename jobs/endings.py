"""Turns the exception that a job's work ended with into the job's end or its next try. Called by drain and uploader.

Which exception means what stands in `jobs/faults.py`; this file only acts.
"""

import logging
import random
import traceback

from django.db import DatabaseError

from core.errors import CoreError
from core.memory_ladder import GENERATION_RUNGS, training_rungs
from core.train_config import TrainConfig
from jobs import lifecycle
from jobs.backoff import full_jitter
from jobs.connections import connection_refresh
from jobs.errors import LeaseLost
from jobs.faults import MAX_STORE_RETRIES, MAX_SURPRISE_RETRIES, Fault, Remedy, fault_of
from jobs.heartbeat import Hold
from jobs.models import Job
from jobs.scratch import scratch_remove, scratch_sweep
from jobs.status import AttemptOutcome, JobKind

logger = logging.getLogger(__name__)

STORE_DELAY_SECONDS = (2.0, 300.0)
"""Shortest and longest wait before inputs that could not be fetched are tried again."""


def job_end(hold: Hold, error: BaseException) -> Remedy:
    """End this try. Never raises: what cannot be recorded is found when the lease runs out.

    Returns:
        What was done about it.
    """
    fault = fault_of(error)
    logger.log(
        logging.ERROR if fault.remedy in (Remedy.ONCE_MORE, Remedy.NEW_PROCESS) else logging.INFO,
        "job try ended id=%s token=%s remedy=%s reason=%s",
        hold.job.pk,
        hold.token,
        fault.remedy.name,
        error,
        exc_info=error if fault.remedy in (Remedy.ONCE_MORE, Remedy.NEW_PROCESS, Remedy.ABANDON) else None,
    )
    try:
        _act(hold, error, fault)
    except LeaseLost as lost:
        logger.warning("job dropped id=%s token=%s reason=%s", hold.job.pk, hold.token, lost)
    except DatabaseError:
        # Nothing can be recorded now. The lease runs out and another worker goes on from the last checkpoint.
        logger.exception("job abandoned id=%s token=%s reason=database", hold.job.pk, hold.token)
        connection_refresh()
    finally:
        scratch_remove(hold)
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)  # They keep tensors alive, which the next try needs room for.
    return fault.remedy


def _act(hold: Hold, error: BaseException, fault: Fault) -> None:
    job_id, token, job = hold.job.pk, hold.token, hold.job
    match fault.remedy:
        case Remedy.DROP | Remedy.ABANDON:
            pass
        case Remedy.CANCEL:
            lifecycle.job_cancelled(job_id=job_id, token=token)
        case Remedy.RELEASE:
            lifecycle.job_release(job_id=job_id, token=token, reason=fault.message)
        case Remedy.PREEMPT:
            lifecycle.job_preempted(job_id=job_id, token=token, reason=fault.message)
        case Remedy.FAIL:
            lifecycle.job_fail(job_id=job_id, token=token, code=fault.code, message=fault.message)
        case Remedy.WAIT:
            _wait(hold, fault)
        case Remedy.SAVE_MEMORY:
            _save_memory(hold, fault)
        case Remedy.NEW_PROCESS:
            row = Job.objects.get(pk=job_id)
            if row.token == token:
                lifecycle.job_lost(
                    job=row, reason=fault.message, outcome=AttemptOutcome.DEVICE_ERROR, only_expired=False
                )
        case Remedy.FREE_DISK | Remedy.ONCE_MORE:
            shown = "".join(traceback.format_exception(error))[-20_000:]
            if fault.remedy is Remedy.FREE_DISK:
                scratch_remove(hold)
                logger.warning("disk full: removed folders of ended tries count=%d", scratch_sweep())
            if job.surprise_retries < MAX_SURPRISE_RETRIES:
                lifecycle.job_release(
                    job_id=job_id,
                    token=token,
                    reason=f"{fault.message} One more try.",
                    outcome=AttemptOutcome.FAILED,
                    surprise_retries=job.surprise_retries + 1,
                    error_traceback=shown,
                )
            else:
                lifecycle.job_fail(job_id=job_id, token=token, code=fault.code, message=fault.message, traceback=shown)


def _wait(hold: Hold, fault: Fault) -> None:
    retries = hold.job.store_retries + 1
    if retries > MAX_STORE_RETRIES:
        message = f"What the job needs could not be fetched in {retries} tries: {fault.message}. Retry it later."
        lifecycle.job_fail(job_id=hold.job.pk, token=hold.token, code=fault.code, message=message)
        return
    shortest, longest = STORE_DELAY_SECONDS
    delay = max(shortest, full_jitter(shortest, longest, retries, random.Random()))
    lifecycle.job_release(
        job_id=hold.job.pk, token=hold.token, reason=fault.message, delay_seconds=delay, store_retries=retries
    )


def _save_memory(hold: Hold, fault: Fault) -> None:
    rung = hold.job.memory_rung + 1
    ways = _ways(hold.job)
    if rung >= len(ways):
        lifecycle.job_fail(job_id=hold.job.pk, token=hold.token, code=fault.code, message=fault.message)
        return
    lifecycle.job_release(
        job_id=hold.job.pk,
        token=hold.token,
        reason=f"out of memory ({ways[rung - 1]}); next: {ways[rung]}",
        outcome=AttemptOutcome.OUT_OF_MEMORY,
        memory_rung=rung,
    )


def _ways(job: Job) -> list[str]:
    """Words for each rung of the job's ladder, the fastest way first."""
    if job.kind == JobKind.GENERATE:
        return [rung.says for rung in GENERATION_RUNGS]
    if job.kind == JobKind.TRAIN:
        try:
            return [says for _, says in training_rungs(TrainConfig.parse(job.spec))]
        except CoreError:
            logger.exception("no memory ladder for job id=%s", job.pk)
    return ["the only way"]
