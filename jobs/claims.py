"""Claiming: which waiting jobs this worker takes now, and taking them. Whose turn it is says `jobs/scheduling.py`."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

from django.conf import settings

from jobs.models import WorkerProcess
from jobs.queue import free_workers, owners_and_running, running_now, waiting_candidates
from jobs.recovery import expired_leases_requeue
from jobs.scheduling import PICTURES_PER_BATCH, Candidate, Scheduler
from jobs.status import INTERACTIVE, QUEUES, JobKind
from jobs.taking import Claim, Wanted, jobs_take

LOOKS = 4
"""Times that a claim reads the line again because others took all that it saw."""


def jobs_claim(
    *,
    kind: str,
    worker: WorkerProcess,
    at_most: int = 1,
    batch_key: str = "",
    pictures: int = PICTURES_PER_BATCH,
    at_hand: Callable[[str], bool] | None = None,
) -> list[Claim]:
    """Take the best claimable job of this kind and, of pictures, others that may share its forward, in order.

    Args:
        at_most: Jobs, >= 1.
        batch_key: Of a run that they join; empty: of whatever the best job is.
        pictures: Of all of them together, where they join a run.
        at_hand: Whether a LoRA of this hash is on this machine, where it fetches ahead: a new job is left alone while
            its own are being fetched.

    Returns:
        Nothing when nothing waits that may run here now, or when it is the turn of a job that cannot join.
    """
    look = partial(waiting_candidates, [kind], warm_bases=worker.warm_bases, with_loras=at_hand is not None)
    # Lost leases go back to the queue first: the next claim finds them, and not only the dispatcher's sweep.
    swept = False
    for _ in range(LOOKS):
        now, candidates, expired = look()
        if not swept and (expired or now is None):
            swept = True
            if expired_leases_requeue(kinds=[kind]):
                now, candidates, _ = look()
        if now is None:
            return []
        candidates = _startable(candidates, now, worker)
        scheduler = _scheduler(candidates, now, worker)
        _know_warm(scheduler, candidates, at_hand)
        full: set[tuple[UUID, str]] = set()
        missed = False
        for first in scheduler.order(candidates):
            if (first.owner_id, first.kind) in full or scheduler.is_coming(first):
                continue
            if batch_key and (first.batch_key != batch_key or first.was_lost):
                return []
            batch = _with_companions(scheduler, first, at_most, pictures, at_hand)
            if batch_key and batch[0].pictures > pictures:
                return []
            claims, reached = jobs_take(
                [Wanted(job.job_id, job.owner_id, job.kind) for job in batch], worker=worker, limits=_limits()
            )
            if claims:
                return claims
            full |= reached
            missed = missed or not reached
        if not missed:
            return []
    return []


def _scheduler(candidates: Sequence[Candidate], now: datetime, worker: WorkerProcess) -> Scheduler:
    owner_ids = {candidate.owner_id for candidate in candidates}
    # Where one person waits there is nobody to compare with, and limits are looked at again when a job is taken.
    owners, running = owners_and_running(owner_ids, now) if len(owner_ids) > 1 else ({}, [])
    return Scheduler(
        now=now,
        owners=owners,
        running=running,
        limits=_limits(),
        warm_bases=frozenset(worker.warm_bases),
    )


def _limits() -> dict[str, int]:
    return {
        JobKind.GENERATE: settings.LORASITE["MAX_RUNNING_GENERATIONS_PER_PERSON"],
        JobKind.TRAIN: settings.LORASITE["MAX_RUNNING_TRAININGS_PER_PERSON"],
    }


def _startable(candidates: list[Candidate], now: datetime, worker: WorkerProcess) -> list[Candidate]:
    """Without trainings that leave this worker to people who sit and wait."""
    if all(job.kind != JobKind.TRAIN for job in candidates):
        return candidates
    interactive = waiting_candidates(sorted(INTERACTIVE), per_owner=1).candidates
    if not interactive:
        return candidates
    scheduler = Scheduler(now=now, running=running_now(), limits=_limits())
    free = free_workers(QUEUES[JobKind.TRAIN], besides=worker)
    return [
        job
        for job in candidates
        if job.kind != JobKind.TRAIN or scheduler.may_start(job, interactive=interactive, free_workers=free)
    ]


def _know_warm(scheduler: Scheduler, candidates: Sequence[Candidate], at_hand: Callable[[str], bool] | None) -> None:
    if at_hand is not None:
        # The empty name: that this machine fetches ahead counts even while it has none of them.
        scheduler.know_warm({"", *(lora for job in candidates for lora in job.loras if at_hand(lora))})


def _with_companions(
    scheduler: Scheduler,
    first: Candidate,
    at_most: int,
    pictures: int,
    at_hand: Callable[[str], bool] | None,
) -> list[Candidate]:
    if at_most == 1 or not first.batch_key or first.kind != JobKind.GENERATE:
        return [first]
    same = waiting_candidates(
        [first.kind], batch_key=first.batch_key, per_owner=at_most, with_loras=at_hand is not None
    ).candidates
    _know_warm(scheduler, same, at_hand)
    # With its number of pictures. When it is not there any more, taking it fails as well.
    first = next((job for job in same if job.job_id == first.job_id), first)
    return scheduler.batch(first, same, at_most=at_most, pictures=pictures)
