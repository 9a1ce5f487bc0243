"""Which trainings make room for work that somebody waits for. Called by the dispatcher; the worker does the yielding.

The choice is a pure function; asking is one guarded UPDATE per training, which a later claim of the job clears.
"""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from django.db.models import Case, Count, DateTimeField, F, Max, Q, When
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.database_clock import after
from jobs.models import Job, WorkerProcess
from jobs.queue import free_workers
from jobs.status import INTERACTIVE, QUEUES, JobKind, JobState
from jobs.workers import live_workers

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0
"""Interactive work that waits no longer than this is probably about to be claimed."""
BETWEEN_YIELDS_SECONDS = 60.0
"""A training computes at least this long before it makes room (again): every yield costs a save and a load."""


class Training(NamedTuple):
    """A running training as the choice sees it."""

    job_id: UUID
    token: int
    queues: frozenset[str]
    """Celery queues of the worker that holds it: which work would get its place."""
    since: datetime
    """Start of this try."""
    yielded_at: datetime | None
    asked: bool
    """It was asked already and has not gone yet."""


def trainings_to_ask(
    trainings: Sequence[Training], *, waiting: int, free: int, queue: str, now: datetime
) -> list[Training]:
    """Enough trainings for the waiting jobs of one queue, not more.

    Whoever was asked already counts as a free worker to come. The least recently interrupted goes first (never counts
    as longest ago), of equals the one whose try is youngest, as it has the least in its caches to lose.

    Args:
        waiting: Interactive jobs that wait impatiently for this queue.
        free: Ready workers of this queue that hold nothing.
    """
    here = [training for training in trainings if queue in training.queues]
    needed = waiting - free - sum(training.asked for training in here)
    pause = timedelta(seconds=BETWEEN_YIELDS_SECONDS)
    ready = [
        training
        for training in here
        if not training.asked
        and now - training.since >= pause
        and (training.yielded_at is None or now - training.yielded_at >= pause)
    ]
    never = datetime.min.replace(tzinfo=now.tzinfo)
    ready.sort(key=lambda training: (training.yielded_at or never, now - training.since))
    return ready[: max(0, needed)]


def trainings_ask_to_yield() -> int:
    """Ask as many trainings as impatient interactive work needs. Returns how many were asked."""
    waiting = _impatient_by_queue()
    if not waiting:
        return 0
    asked = 0
    for queue, count in waiting.items():
        rows = list(_running_trainings())
        if not rows:
            return asked
        trainings = [training for training, _ in rows]
        for training in trainings_to_ask(
            trainings, waiting=count, free=free_workers(queue), queue=queue, now=rows[0][1]
        ):
            with side_effect("preemption.ask"):
                done = Job.objects.filter(
                    pk=training.job_id,
                    token=training.token,
                    state=JobState.RUNNING,
                    yield_requested_at__isnull=True,
                ).update(yield_requested_at=Now())
            if done:
                logger.info("training asked to make room job=%s waiting=%d queue=%s", training.job_id, count, queue)
            asked += done
    return asked


def _impatient_by_queue() -> dict[str, int]:
    """{queue: interactive jobs that could have been claimed for `PATIENCE_SECONDS`}."""
    # A retry delay that ended begins the wait anew.
    since = Case(
        When(not_before__gt=F("queued_at"), then=F("not_before")),
        default=F("queued_at"),
        output_field=DateTimeField(),
    )
    rows = (
        Job.objects.claimable()
        .filter(kind__in=INTERACTIVE)
        .annotate(since=since)
        .filter(since__lte=after(-PATIENCE_SECONDS))
        .order_by()
    )
    waiting: dict[str, int] = {}
    for kind, count in rows.values_list("kind").annotate(Count("id")):
        queue = QUEUES[JobKind(kind)]
        waiting[queue] = waiting.get(queue, 0) + count
    return waiting


def _running_trainings() -> list[tuple[Training, datetime]]:
    alive = dict(live_workers().values_list("pk", "queues"))
    rows = (
        Job.objects.filter(state=JobState.RUNNING, kind=JobKind.TRAIN, cancel_requested_at__isnull=True)
        .filter(worker__in=WorkerProcess.objects.filter(pk__in=alive))
        .annotate(since=Max("attempts__started_at", filter=Q(attempts__ended_at__isnull=True)), now=Now())
        .order_by()
    )
    columns = ("pk", "token", "worker_id", "since", "yielded_at", "yield_requested_at", "now")
    return [
        (Training(pk, token, frozenset(alive[worker]), since, yielded, asked is not None), now)
        for pk, token, worker, since, yielded, asked, now in rows.values_list(*columns)
        if since is not None
    ]
