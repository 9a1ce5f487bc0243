"""What a task does with a doorbell: claim, compute, hand the results to the uploader, and again until nothing is left.

Which exception ends a try in which way stands in `jobs/faults.py` and `jobs/endings.py`.
"""

import logging
import time
from collections.abc import Callable, Sequence

from django.conf import settings
from django.db import DatabaseError

from core.failpoints import side_effect
from jobs.claims import jobs_claim
from jobs.company import Company, Join, Start, Together, nobody
from jobs.connections import connection_refresh
from jobs.faults import Remedy
from jobs.heartbeat import Hold
from jobs.scheduling import FETCH_SECONDS, PICTURES_PER_BATCH
from jobs.status import JobKind
from jobs.taking import Claim
from jobs.worker_context import WorkerContext, current

logger = logging.getLogger(__name__)

JOBS_TOGETHER = 8
"""Requests that may share one forward."""
FETCH_WAIT_SECONDS = 0.25
"""A free process waits so long at once for a file that is coming; others may have come to the line meanwhile."""
JOIN_SECONDS, LONGEST_JOIN_SECONDS = 0.25, 2.0
"""Between two looks for jobs that join; each look that finds none doubles the wait, up to the longest."""


def drain(kind: JobKind, start: Start, together: Together | None = None) -> None:
    """Work on jobs of one kind until none is claimable, the time is up, or the worker must go."""
    context = current()
    end = time.monotonic() + settings.LORASITE["DRAIN_SECONDS"]

    def is_over() -> bool:
        return time.monotonic() >= end or not context.may_claim()

    while context.uploader.wait_for_room(give_up=is_over):
        claims = _claim_or_wait(kind, context, at_most=JOBS_TOGETHER if together else 1)
        if not claims:
            break
        join = Joining(kind, context, claims[0], is_over=is_over) if together else nobody
        remedies = run([context.heartbeat.take(claim) for claim in claims], start, together, join=join)
        if Remedy.PREEMPT in remedies:
            break  # Its place is wanted: take the next doorbell, not the next training.
    context.leave_if_due()


def run(holds: Sequence[Hold], start: Start, together: Together | None = None, *, join: Join = nobody) -> set[Remedy]:
    """Take claimed jobs to the uploader, or to their end. Never raises for what a job can do wrong.

    Returns:
        What had to be done about those that did not come so far.
    """
    context = current()
    began = time.monotonic()
    company = Company(context, start, join=join)
    company.compute(holds, together)
    context.after_faults(company.remedies)
    logger.info("jobs computed count=%d seconds=%.1f", company.count, time.monotonic() - began)
    return company.remedies


class Joining:
    """Claims jobs that join a run: not too often, and never past somebody whose turn it is.

    Args:
        first: Of the run. One that was lost before, or saves memory, keeps to itself.
        is_over: Whether nothing may be claimed any more.
    """

    def __init__(self, kind: JobKind, context: WorkerContext, first: Claim, *, is_over: Callable[[], bool]) -> None:
        self._kind, self._context, self._is_over = kind, context, is_over
        again = first.job.attempts_count > 1 or first.job.memory_rung > 0
        self._batch_key = "" if again else first.job.batch_key
        self._wait_seconds = JOIN_SECONDS
        self._due_at = time.monotonic() + JOIN_SECONDS

    def __call__(self, room: int) -> list[Hold]:
        """Jobs of at most `room` pictures, their leases kept alive."""
        if not self._batch_key or room < 1 or time.monotonic() < self._due_at:
            return []
        if self._is_over() or not self._context.uploader.has_room():
            return []
        claims = _claim(self._kind, self._context, at_most=JOBS_TOGETHER, batch_key=self._batch_key, pictures=room)
        self._wait_seconds = JOIN_SECONDS if claims else min(2 * self._wait_seconds, LONGEST_JOIN_SECONDS)
        self._due_at = time.monotonic() + self._wait_seconds
        if claims:
            with side_effect("run.join"):  # Their leases are in the database, and nobody keeps them alive yet.
                logger.info("jobs join a run count=%d", len(claims))
        return [self._context.heartbeat.take(claim) for claim in claims]


def _claim_or_wait(kind: JobKind, context: WorkerContext, *, at_most: int) -> list[Claim]:
    """The next jobs; where all that wait have LoRAs that are just being fetched, those that come first."""
    prefetch, end = context.prefetch, time.monotonic() + FETCH_SECONDS
    while True:
        missing: list[str] = []
        claims = _claim(kind, context, at_most=at_most, missing=missing)
        if claims or not missing or prefetch is None or time.monotonic() >= end or not context.may_claim():
            return claims
        if not prefetch.wait(FETCH_WAIT_SECONDS):
            return []


def _claim(
    kind: JobKind,
    context: WorkerContext,
    *,
    at_most: int,
    batch_key: str = "",
    pictures: int = PICTURES_PER_BATCH,
    missing: list[str] | None = None,
) -> list[Claim]:
    prefetch = context.prefetch

    def at_hand(lora: str) -> bool:
        has = prefetch is not None and prefetch.has(lora)
        if not has and missing is not None:
            missing.append(lora)
        return has

    try:
        return jobs_claim(
            kind=kind,
            worker=context.worker,
            at_most=at_most,
            batch_key=batch_key,
            pictures=pictures,
            at_hand=at_hand if prefetch else None,
        )
    except DatabaseError:
        # The dispatcher rings again once the database is back.
        logger.exception("claim failed kind=%s", kind)
        connection_refresh()
        return []
