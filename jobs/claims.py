"""Claiming: which waiting jobs this worker takes now, and taking them. Whose turn it is says `jobs/scheduling.py`."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count, IntegerField, OuterRef, QuerySet, Subquery, UUIDField
from django.db.models.functions import Coalesce

from core.failpoints import side_effect
from jobs.lifecycle import Claim, job_take
from jobs.models import Job, WorkerProcess
from jobs.prepared_sql import Read, listed, parameters, rounded_up, send
from jobs.queue import free_workers, owners_of, running_now, waiting_candidates
from jobs.recovery import expired_leases_requeue
from jobs.scheduling import PICTURES_PER_BATCH, Candidate, Scheduler
from jobs.status import INTERACTIVE, QUEUES, JobKind, JobState
from jobs.usage import usage_lock, usage_locking

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
            claims, reached = _take_all(batch, worker)
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
    several = len(owner_ids) > 1
    return Scheduler(
        now=now,
        owners=owners_of(owner_ids, now) if several else {},
        running=running_now() if several else (),
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


def _take_all(batch: Sequence[Candidate], worker: WorkerProcess) -> tuple[list[Claim], set[tuple[UUID, str]]]:
    """Take those that still wait and whose owners are below their limits, in one transaction.

    Whoever takes a job with a limit locks its owner's usage row first, so that the count cannot grow meanwhile.

    Returns:
        The claims in the order of `batch`, and the (owner, kind) at their limits.
    """
    limits, claims, full = _limits(), [], set()
    taken: Counter[tuple[UUID, str]] = Counter()
    with side_effect("claim.commit"), transaction.atomic():
        # In one order everywhere: two claims never wait for each other.
        owner_ids = sorted({job.owner_id for job in batch if job.kind in limits})
        count = rounded_up(len(batch))
        # A statement of its own after the locks: it sees what their earlier holders committed.
        waiting = _CLAIMABLE.run(count, **listed("job", count, [job.job_id for job in batch]))
        *locked, rows = send(*map(usage_locking, owner_ids), waiting)
        if not all(locked):
            for owner_id in owner_ids:
                usage_lock(owner_id)  # makes the row of somebody's first time
            (rows,) = send(waiting)
        found = {job.pk: (job, running) for job, running in map(_job_and_running, rows)}
        for candidate in batch:
            job, running = found.get(candidate.job_id, (None, 0))
            if job is None:
                continue
            key = (job.owner_id, job.kind)
            if job.kind in limits and running + taken[key] >= limits[job.kind]:
                full.add(key)
                continue
            claim = job_take(job=job, worker=worker)
            if claim is not None:
                taken[key] += 1
                claims.append(claim)
    return claims, full


def _claimable(count: int) -> "QuerySet[Job, Any]":
    """These jobs as far as they still wait, and how many of the same person and kind occupy a worker.

    Locked where the database can; rows that another worker is claiming right now are passed over.
    """
    # One that only stores its results occupies none.
    same = Job.objects.filter(owner=OuterRef("owner"), kind=OuterRef("kind"), state=JobState.RUNNING)
    running = same.order_by().values("owner").annotate(count=Count("pk")).values("count")
    rows = Job.objects.claimable().filter(pk__in=parameters("job", count, UUIDField())).order_by()
    if connection.features.has_select_for_update_skip_locked:
        rows = rows.select_for_update(skip_locked=True)
    counted = rows.annotate(running=Coalesce(Subquery(running, output_field=IntegerField()), 0))
    return counted.values_list(*(field.attname for field in Job._meta.concrete_fields), "running")


_CLAIMABLE = Read(_claimable)


def _job_and_running(row: list[Any]) -> tuple[Job, int]:
    *columns, running = row
    return Job.from_db(connection.alias, [field.attname for field in Job._meta.concrete_fields], columns), running
