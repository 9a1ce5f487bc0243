"""Reads of the waiting line: what a claim may choose from, who used how much, who runs what, how much waits."""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db.models import (
    Case,
    CharField,
    Count,
    Exists,
    F,
    JSONField,
    Q,
    QuerySet,
    TextField,
    UUIDField,
    Value,
    When,
    Window,
)
from django.db.models.functions import Cast, Now, RowNumber

from jobs.database_clock import after
from jobs.models import Job, JobAttempt, User, WorkerProcess
from jobs.prepared_sql import Parameter, Read, listed, parameters, rounded_up, send
from jobs.scheduling import AFFINITY_SECONDS, Candidate, Owner, Running, decayed
from jobs.status import QUEUES, JobKind, JobState, WorkerState
from jobs.workers import live_workers

CANDIDATES_PER_OWNER = 2
"""A thousand jobs of one person hide nobody else's. The second is for when another worker takes the first."""
OWNERS_PER_CLAIM = 200
COLUMNS = (
    *("id", "owner_id", "kind", "kept", "priority", "created_at", "queued_at", "base_model__fingerprint"),
    *("batch_key", "estimated_seconds", "pictures", "loras", "now", "expired"),
)


class Waiting(NamedTuple):
    """What one look at the line saw."""

    now: datetime | None
    """The database's time; None when nothing waits."""
    candidates: list[Candidate]
    expired: bool
    """Some lease of these kinds has run out; unknown (False) when nothing waits."""


def waiting_candidates(
    kinds: Sequence[str],
    *,
    warm_bases: Collection[str] = (),
    batch_key: str = "",
    per_owner: int = CANDIDATES_PER_OWNER,
    with_loras: bool = False,
) -> Waiting:
    """The best claimable jobs of each person, in the order in which the rules would take them; one query.

    Args:
        warm_bases: Fingerprints that are loaded where the jobs would run.
        batch_key: Only jobs of this key, and how many pictures each asks for.
        per_owner: Jobs of each person at most, >= 1.
        with_loras: Also which LoRAs they name.
    """
    warm = sorted(warm_bases)
    places = rounded_up(len(warm)) if warm else 0
    found = _WAITING.rows(
        tuple(kinds),
        places,
        bool(batch_key),
        per_owner,
        with_loras,
        batch_key=batch_key,
        **listed("base", places, warm),
    )
    if not found:
        return Waiting(None, [], False)
    candidates = [
        Candidate(
            job_id=job_id,
            owner_id=owner_id,
            kind=kind,
            was_lost=kept == 0,
            priority=priority,
            created_at=created_at,
            queued_at=queued_at,
            base_fingerprint=base or "",
            batch_key=key,
            estimated_seconds=seconds,
            pictures=pictures or 1,
            loras=tuple(use["sha256"] for use in loras or ()),
        )
        for job_id, owner_id, kind, kept, priority, created_at, queued_at, base, key, *rest in found
        for seconds, pictures, loras in [rest[:3]]
    ]
    now, expired = found[0][-2:]
    return Waiting(datetime.fromisoformat(now).replace(tzinfo=UTC), candidates, bool(expired))


def owners_and_running(owner_ids: Iterable[UUID], now: datetime) -> tuple[dict[UUID, Owner], list[Running]]:
    """What each of these people got, with their weights, and everything that runs; one round trip."""
    wanted = list(owner_ids)
    count = rounded_up(len(wanted))
    rows, running = send(_OWNERS.run(count, **listed("owner", count, wanted)), _RUNNING.run())
    owners = {
        pk: Owner(
            used_seconds=0.0 if as_of is None else decayed(seconds, as_of, now),
            served_at=as_of,
            weight=max(weight, 0.01),
        )
        for pk, weight, seconds, as_of in rows
    }
    return owners, [_as_running(row) for row in running]


def running_now() -> list[Running]:
    """Everything that occupies a worker; results that are being stored do not."""
    return [_as_running(row) for row in _RUNNING.rows()]


def _as_running(row: list[Any]) -> Running:
    owner_id, kind, started_at, seconds = row
    return Running(owner_id=owner_id, kind=kind, started_at=started_at, estimated_seconds=seconds)


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


def _waiting(
    kinds: tuple[str, ...], warm_bases: int, keyed: bool, per_owner: int, with_loras: bool
) -> "QuerySet[Job, Any]":
    # Who made room begins to wait in the very statement that says so: that is no loss.
    lost = Q(attempts_count__gt=0) & (Q(yielded_at__isnull=True) | ~Q(yielded_at=F("queued_at")))
    first_lost = Case(When(lost, then=Value(0)), default=Value(1))
    order: list[Any] = [first_lost, F("priority").desc()]
    if warm_bases:
        old = Q(queued_at__lt=after(-AFFINITY_SECONDS))
        fits = Q(base_model__fingerprint="") | Q(
            base_model__fingerprint__in=parameters("base", warm_bases, CharField())
        )  # fmt: skip
        warm = old | Q(base_model__isnull=True) | fits
        order.append(Case(When(warm, then=Value(0)), default=Value(1)))
    place = Window(RowNumber(), partition_by="owner_id", order_by=[*order, "created_at", "id"])
    rows = Job.objects.claimable().filter(kind__in=kinds)
    if keyed:
        rows = rows.filter(batch_key=Parameter("batch_key", CharField()))
    best = rows.annotate(
        place=place,
        kept=first_lost,
        # As text: what is the same in every row is made a date once.
        now=Cast(Now(), TextField()),
        expired=Exists(Job.objects.lease_expired().filter(kind__in=kinds)),
        pictures=F("spec__count") if keyed else Value(1),
        loras=F("spec__loras") if with_loras else Value(None, output_field=JSONField()),
    ).filter(place__lte=per_owner)
    return best.order_by("place").values_list(*COLUMNS)[: OWNERS_PER_CLAIM * per_owner]


def _owners(count: int) -> "QuerySet[User, Any]":
    rows = User.objects.filter(pk__in=parameters("owner", count, UUIDField())).order_by()
    return rows.values_list("pk", "scheduling_weight", "usage__worker_seconds", "usage__as_of")


def _running() -> "QuerySet[JobAttempt, Any]":
    rows = JobAttempt.objects.filter(ended_at__isnull=True, job__state=JobState.RUNNING).order_by()
    return rows.values_list("job__owner_id", "job__kind", "started_at", "job__estimated_seconds")


_WAITING, _OWNERS, _RUNNING = Read(_waiting), Read(_owners), Read(_running)
