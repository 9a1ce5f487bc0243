"""Reads of the waiting line: what a claim may choose from, who used how much, who runs what, how much waits."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from django.db.models import Case, Count, Exists, F, Q, Value, When, Window
from django.db.models.functions import Now, RowNumber

from jobs.models import Job, JobAttempt, User, WorkerProcess
from jobs.scheduling import Candidate, Owner, Running
from jobs.status import QUEUES, JobKind, JobState, WorkerState
from jobs.usage import decayed
from jobs.workers import live_workers

CANDIDATES_PER_OWNER = 8
"""The best few of each person: a thousand jobs of one hide nobody else's."""
OWNERS_PER_CLAIM = 200


class Waiting(NamedTuple):
    """What one look at the line saw."""

    now: datetime | None
    """The database's time; None when nothing waits."""
    candidates: list[Candidate]
    expired: bool
    """Some lease of these kinds has run out; unknown (False) when nothing waits."""


def waiting_candidates(kinds: Sequence[str], *, batch_key: str = "", per_owner: int = CANDIDATES_PER_OWNER) -> Waiting:
    """The best few claimable jobs of each person by priority and age, lost work first; one query.

    Args:
        batch_key: Only jobs of this key, and how many pictures each asks for.
    """
    # Who made room begins to wait in the very statement that says so: that is no loss.
    lost = Q(attempts_count__gt=0) & (Q(yielded_at__isnull=True) | ~Q(yielded_at=F("queued_at")))
    first_lost = Case(When(lost, then=Value(0)), default=Value(1))
    place = Window(RowNumber(), partition_by="owner_id", order_by=[first_lost, F("priority").desc(), "created_at"])
    rows = Job.objects.claimable().filter(kind__in=kinds)
    columns = ["id", "owner_id", "kind", "priority", "created_at", "queued_at", "batch_key", "estimated_seconds"]
    columns += ["attempts_count", "yielded_at", "base_model__fingerprint", "now", "expired"]
    if batch_key:
        rows, columns = rows.filter(batch_key=batch_key), [*columns, "spec__count"]
    expired = Exists(Job.objects.lease_expired().filter(kind__in=kinds))
    best = rows.annotate(place=place, now=Now(), expired=expired).filter(place__lte=per_owner).order_by("place")
    found = list(best.values(*columns)[: OWNERS_PER_CLAIM * per_owner])
    if not found:
        return Waiting(None, [], False)
    candidates = [
        Candidate(
            job_id=row["id"],
            owner_id=row["owner_id"],
            kind=row["kind"],
            was_lost=row["attempts_count"] > 0 and row["yielded_at"] != row["queued_at"],
            priority=row["priority"],
            created_at=row["created_at"],
            queued_at=row["queued_at"],
            base_fingerprint=row["base_model__fingerprint"] or "",
            batch_key=row["batch_key"],
            estimated_seconds=row["estimated_seconds"],
            pictures=row.get("spec__count") or 1,
        )
        for row in found
    ]
    return Waiting(found[0]["now"], candidates, bool(found[0]["expired"]))


def owners_of(owner_ids: Iterable[UUID], now: datetime) -> dict[UUID, Owner]:
    """What each of these people got, and their weights."""
    rows = User.objects.filter(pk__in=list(owner_ids)).values_list(
        "pk", "scheduling_weight", "usage__worker_seconds", "usage__as_of"
    )
    return {
        pk: Owner(
            used_seconds=0.0 if as_of is None else decayed(seconds, as_of, now),
            served_at=as_of,
            weight=max(weight, 0.01),
        )
        for pk, weight, seconds, as_of in rows
    }


def running_now() -> list[Running]:
    """Everything that occupies a worker; results that are being stored do not."""
    rows = JobAttempt.objects.filter(ended_at__isnull=True, job__state=JobState.RUNNING).order_by()
    columns = ("job__owner_id", "job__kind", "started_at", "job__estimated_seconds")
    return [
        Running(owner_id=owner_id, kind=kind, started_at=started_at, estimated_seconds=seconds)
        for owner_id, kind, started_at, seconds in rows.values_list(*columns)
    ]


def free_workers(queue: str, *, besides: WorkerProcess | None = None) -> int:
    """Live, ready workers of a Celery queue that occupy themselves with nothing of it."""
    kinds = [kind for kind in JobKind if QUEUES[kind] == queue]
    busy = Job.objects.filter(state=JobState.RUNNING, kind__in=kinds, worker__isnull=False).values("worker_id")
    idle = live_workers().filter(state=WorkerState.READY).exclude(pk__in=busy)
    if besides is not None:
        idle = idle.exclude(pk=besides.pk)
    return sum(queue in queues for queues in idle.values_list("queues", flat=True))


def waiting_by_kind() -> dict[str, int]:
    """{kind: number of claimable jobs}; kinds without any are absent."""
    return dict(Job.objects.claimable().values_list("kind").annotate(Count("id")).order_by())
