"""What a task does with a doorbell: claim, compute, hand the results to the uploader, and again until nothing is left.

Which exception ends a try in which way stands in `jobs/faults.py` and `jobs/endings.py`.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from django.conf import settings
from django.db import DatabaseError

from core.failpoints import side_effect
from jobs import lifecycle
from jobs.claims import jobs_claim
from jobs.connections import connection_refresh
from jobs.endings import job_end
from jobs.faults import Remedy, fault_of
from jobs.heartbeat import Hold
from jobs.lifecycle import Claim
from jobs.status import JobKind
from jobs.uploader import result_upload
from jobs.worker_context import WorkerContext, current

logger = logging.getLogger(__name__)

JOBS_TOGETHER = 8
"""Requests that may share one forward."""
SHARED_FATES = frozenset(
    {Remedy.WAIT, Remedy.SAVE_MEMORY, Remedy.NEW_PROCESS, Remedy.FREE_DISK, Remedy.ABANDON, Remedy.RELEASE}
)
"""Faults of the machine or its surroundings, which meet all requests of a forward alike."""


class JobWork(Protocol):
    """One claimed job on its way. The parts run in this order; `store` and `record` in the uploader's thread."""

    hold: Hold

    def compute(self) -> None:
        """Do the work into local files. Calls `hold.report` between steps."""

    def files(self) -> list[Path]:
        """What was computed, all of it in local files."""

    def store(self) -> None:
        """Put the files into the artifact store, one try each; nothing is visible yet. May be called again."""

    def record(self) -> None:
        """Write the result rows. Runs in the transaction that ends the job."""


Start = Callable[[Hold], JobWork]
Together = Callable[[Sequence[Any]], list[Exception | None]]
"""Computes several works at once; says for each what stopped it. Raises what stopped all of them."""


def drain(kind: JobKind, start: Start, together: Together | None = None) -> None:
    """Work on jobs of one kind until none is claimable, the time is up, or the worker must go."""
    context = current()
    end = time.monotonic() + settings.LORASITE["DRAIN_SECONDS"]

    def is_over() -> bool:
        return time.monotonic() >= end or not context.may_claim()

    while context.uploader.wait_for_room(give_up=is_over):
        claims = _claim(kind, context, at_most=JOBS_TOGETHER if together else 1)
        if not claims:
            break
        remedies = run([context.heartbeat.take(claim) for claim in claims], start, together)
        if Remedy.PREEMPT in remedies:
            break  # Its place is wanted: take the next doorbell, not the next training.
    context.leave_if_due()


def _claim(kind: JobKind, context: WorkerContext, *, at_most: int) -> list[Claim]:
    try:
        return jobs_claim(kind=kind, worker=context.worker, at_most=at_most)
    except DatabaseError:
        # The dispatcher rings again once the database is back.
        logger.exception("claim failed kind=%s", kind)
        connection_refresh()
        return []


def run(holds: Sequence[Hold], start: Start, together: Together | None = None) -> set[Remedy]:
    """Take claimed jobs to the uploader, or to their end. Never raises for what a job can do wrong.

    Returns:
        What had to be done about those that did not come so far.
    """
    context = current()
    began = time.monotonic()
    for hold in holds:
        logger.info("job started id=%s kind=%s token=%s", hold.job.pk, hold.job.kind, hold.token)
    remedies = set()
    for hold, work, error in _compute(holds, start, together):
        error = error or _hand_over(hold, work, context)
        if error is not None:
            context.uploader.drop_checkpoints(hold)
            remedies.add(job_end(hold, error))
            context.heartbeat.let_go(hold)
    context.after_faults(remedies)
    logger.info("jobs computed count=%d seconds=%.1f", len(holds), time.monotonic() - began)
    return remedies


def _compute(
    holds: Sequence[Hold], start: Start, together: Together | None
) -> list[tuple[Hold, JobWork | None, Exception | None]]:
    """Each hold with its computed work, or with what stopped it."""
    works: list[JobWork | None] = []
    errors: list[Exception | None] = []
    for hold in holds:
        work, error = None, None
        try:
            work = start(hold)
        except Exception as stopped:  # noqa: BLE001 - becomes the end of this try
            error = stopped
        works.append(work)
        errors.append(error)
    ready = [number for number, error in enumerate(errors) if error is None]
    outcomes = _compute_works([work for work in works if work is not None], together)
    for number, outcome in zip(ready, outcomes, strict=True):
        errors[number] = outcome
    return list(zip(holds, works, errors, strict=True))


def _compute_works(works: Sequence[JobWork], together: Together | None) -> list[Exception | None]:
    if together is not None and len(works) > 1:
        try:
            with ExitStack() as stack:
                for work in works:
                    stack.enter_context(work.hold.computing())
                return together(works)
        except Exception as error:
            if fault_of(error).remedy in SHARED_FATES:
                return [error] * len(works)
            # It may be the fault, or the wish, of one of them: nobody else may suffer from it.
            logger.exception("jobs could not be computed together count=%d", len(works))
    return [_compute_one(work) for work in works]


def _compute_one(work: JobWork) -> Exception | None:
    try:
        with work.hold.computing():
            work.compute()
    except Exception as error:  # noqa: BLE001 - becomes the end of this try
        return error
    return None


def _hand_over(hold: Hold, work: JobWork | None, context: WorkerContext) -> Exception | None:
    """Computed files are safe on this disk: the job is UPLOADING, the process is free for the next one."""
    try:
        hold.write_progress()
        if work is None:
            return None
        hold.check()
        size_bytes = 0
        for path in work.files():
            size_bytes += path.stat().st_size
            _sync(path)
        lifecycle.job_uploading(job_id=hold.job.pk, token=hold.token)
    except Exception as error:  # noqa: BLE001 - becomes the end of this try
        return error
    context.uploader.drop_checkpoints(hold)
    context.uploader.add(result_upload(hold, work, size_bytes=size_bytes))
    return None


def _sync(path: Path) -> None:
    with side_effect("result.sync"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
