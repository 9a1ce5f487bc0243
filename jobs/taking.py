"""QUEUED → RUNNING: locks, limits, token, attempt and event in one message to the database. Called by `jobs/claims.py`.

Like `jobs/lifecycle.py` it writes job states, by guarded updates; which jobs to take is not decided here.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection, transaction
from django.db.models import (
    CharField,
    Count,
    DurationField,
    Exists,
    F,
    IntegerField,
    Model,
    OuterRef,
    QuerySet,
    Subquery,
    UUIDField,
    Value,
)
from django.db.models.functions import Coalesce, Now
from django.db.models.sql import UpdateQuery

from core.failpoints import side_effect
from jobs.database_clock import later_by
from jobs.leases import lease_seconds
from jobs.models import Job, JobAttempt, JobEvent, OwnerUsage, WorkerProcess
from jobs.prepared_sql import (
    InsertFrom,
    Parameter,
    Read,
    Run,
    Write,
    listed,
    parameters,
    rounded_up,
    send_whole,
    update_of,
)
from jobs.status import JobState
from jobs.usage import usage_lock, usage_locking

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds, and the token that proves it.

    `asked_at` (seconds, monotonic) is from before the database gave the lease: a late answer has used up part of it.
    """

    job: Job
    token: int
    asked_at: float


class Wanted(NamedTuple):
    """A waiting job, as far as taking it needs to be told."""

    job_id: UUID
    owner_id: UUID
    kind: str


def jobs_take(
    wanted: Sequence[Wanted], *, worker: WorkerProcess, limits: Mapping[str, int]
) -> tuple[list[Claim], set[tuple[UUID, str]]]:
    """Take those that still wait and whose owners are below their limits, with new tokens, all in one transaction.

    Args:
        limits: {kind: jobs of one person that may run at once}; other kinds have no limit.

    Returns:
        The claims in the order of `wanted`, and the (owner, kind) at their limits.
    """
    asked_at = time.monotonic()
    # In one order everywhere: two claims never wait for each other.
    owner_ids = sorted({job.owner_id for job in wanted if job.kind in limits})
    count = rounded_up(len(wanted))
    # Statements of their own after the locks: each sees what their earlier holders committed.
    runs = [run for job in wanted for run in _taking(job, worker, limits)]
    then = _AFTERWARDS.run(count, **listed("job", count, [job.job_id for job in wanted]))
    with side_effect("claim.commit"), side_effect("job.take"), side_effect("attempt.open"):
        answers = send_whole(*map(usage_locking, owner_ids), *runs, then)
    locked, changed, rows = answers[: len(owner_ids)], answers[len(owner_ids) : -1 : _PER_JOB], answers[-1]
    if not all(locked):
        # Somebody's first time: nothing of theirs was taken, as nothing was there to be locked.
        with transaction.atomic():
            for owner_id in owner_ids:
                usage_lock(owner_id)
        if not any(changed):
            return jobs_take(wanted, worker=worker, limits=limits)
    found = {job.pk: (job, running) for job, running in map(_job_and_running, rows)}
    claims, full = [], set()
    for was_taken, one in zip(changed, wanted, strict=True):
        job, running = found.get(one.job_id, (None, 0))
        if job is None:
            continue
        if was_taken:
            job.worker = worker
            logger.info("job id=%s claimed token=%s worker=%s", job.pk, job.token, worker)
            claims.append(Claim(job, job.token, asked_at))
        elif job.state == JobState.QUEUED and one.kind in limits and running >= limits[one.kind]:
            full.add((one.owner_id, one.kind))
    return claims, full


_PER_JOB = 3


def _taking(job: Wanted, worker: WorkerProcess, limits: Mapping[str, int]) -> tuple[Run, ...]:
    """Three statements; those after the first find nothing to do where it took nothing."""
    who = {"job_id": job.job_id, "worker_id": worker.pk}
    lease = timedelta(seconds=lease_seconds(job.kind))
    limited = {"limit": limits[job.kind]} if job.kind in limits else {}
    return (
        _TAKE.run(bool(limited), lease=lease, **limited, **who),
        _OPEN_ATTEMPT.run(worker_name=str(worker), **who),
        _EVENT.run(reason=f"claimed by {worker}"[:300], **who),
    )


_JOB_ID = Parameter("job_id", UUIDField())
_WORKER_ID = Parameter("worker_id", UUIDField())


def _running() -> Any:
    """How many of the same person and kind occupy a worker; one that only stores its results occupies none."""
    same = Job.objects.filter(owner=OuterRef("owner"), kind=OuterRef("kind"), state=JobState.RUNNING)
    count = same.order_by().values("owner").annotate(count=Count("pk")).values("count")
    return Coalesce(Subquery(count, output_field=IntegerField()), 0)


def _take(limited: bool) -> UpdateQuery:
    rows = Job.objects.claimable().filter(pk=_JOB_ID)
    if connection.features.has_select_for_update_skip_locked:
        # A row that another worker is claiming right now is passed over.
        free = Job.objects.claimable().filter(pk=_JOB_ID).order_by().select_for_update(skip_locked=True)
        rows = rows.filter(pk__in=free.values("pk"))
    if limited:
        # The lock on the owner's usage makes the count exact: without a row there was no lock.
        locked = Exists(OwnerUsage.objects.filter(pk=OuterRef("owner_id")))
        rows = rows.annotate(running=_running()).filter(locked, running__lt=Parameter("limit", IntegerField()))
    return update_of(
        rows,
        state=JobState.RUNNING,
        token=F("token") + 1,
        worker=_WORKER_ID,
        lease_until=later_by(Parameter("lease", DurationField())),
        attempts_count=F("attempts_count") + 1,
        started_at=Coalesce("started_at", Now()),
        yield_requested_at=None,
        stage="starting",
    )


def _taken(told: type[Model]) -> "QuerySet[Job]":
    """The job that the statement before has taken: this worker's, of a token that `told` knows nothing of yet."""
    known = told._default_manager.filter(job=OuterRef("pk"), token=OuterRef("token"))
    return Job.objects.filter(~Exists(known), pk=_JOB_ID, worker=_WORKER_ID, state=JobState.RUNNING).order_by()


def _open_attempt() -> tuple[type[Model], "QuerySet[Job]", dict[str, Any]]:
    columns = {name: F(name) for name in ("token", "worker_id", "memory_rung")}
    columns |= {"job_id": F("pk"), "from_step": F("checkpoint_step")}
    name = Parameter("worker_name", CharField())
    return JobAttempt, _taken(JobAttempt), {**columns, "started_at": Now(), "worker_name": name}


def _event() -> tuple[type[Model], "QuerySet[Job]", dict[str, Any]]:
    states = {"old_state": Value(JobState.QUEUED.value), "new_state": F("state")}
    told = {"job_id": F("pk"), "token": F("token"), "at": Now(), "reason": Parameter("reason", CharField())}
    return JobEvent, _taken(JobEvent), states | told


_COLUMNS = [field.attname for field in Job._meta.concrete_fields]


def _afterwards(count: int) -> "QuerySet[Job, Any]":
    rows = Job.objects.filter(pk__in=parameters("job", count, UUIDField())).order_by()
    return rows.annotate(running=_running()).values_list(*_COLUMNS, "running")


def _job_and_running(row: list[Any]) -> tuple[Job, int]:
    *columns, running = row
    return Job.from_db(connection.alias, _COLUMNS, columns), running


_TAKE, _OPEN_ATTEMPT, _EVENT, _AFTERWARDS = (
    Write(_take),
    InsertFrom(_open_attempt),
    InsertFrom(_event),
    Read(_afterwards),
)
