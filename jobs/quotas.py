"""Admission: who may put one more job into the waiting line, and when to come back otherwise.

Called by `jobs/submission.py` inside its transaction; it writes nothing but the person's usage row, which it locks.
"""

import math
from datetime import datetime
from typing import NamedTuple

from django.conf import settings
from django.db.models import Count, Sum

from core.config import GenerateConfig
from core.train_config import TrainConfig
from jobs.errors import InvalidInput, TooBusy
from jobs.estimates import pixel_steps
from jobs.models import Job, JobEvent, User
from jobs.status import TERMINAL, JobKind, JobState
from jobs.usage import usage_lock

COUNTED = frozenset(set(JobKind) - {JobKind.PREPARE_BASE})
"""Kinds that people start. Base models are prepared by operators, also while the line is full."""

LATELY_SECONDS = 600.0
LATELY_EVENTS = 2000
DEFAULT_WAIT_SECONDS = 30
LONGEST_WAIT_SECONDS = 3600
ROOM_SHARE = 0.1
"""Come back when so much of the limit is free again, not for every single place."""

MAX_PIXEL_STEPS = 1_000_000_000
"""Pixels x steps x pictures of one generation: 64 pictures of 512x512 in 59 steps."""
MAX_PICTURES_SHOWN = 10_000_000
"""Steps x batch of one training."""


class Drain(NamedTuple):
    """What left the line lately."""

    jobs: int
    estimated_seconds: float
    over_seconds: float


def admit(*, owner: User, kind: JobKind, estimated_seconds: float, now: datetime) -> None:
    """Let one more job of this person in. Must run between `lock` and the insert, in one transaction.

    A person's limits hold exactly, whatever is sent at once. The limit over all people is read without a lock, which
    would make everybody take turns: it may be passed by as many jobs as are submitted in the same instant.

    Args:
        now: The database's time, as `lock` returned it.

    Raises:
        TooBusy: A limit is reached; says which, and when to come back.
    """
    if kind not in COUNTED:
        return
    limits = settings.LORASITE
    waiting = Job.objects.filter(state=JobState.QUEUED, kind__in=COUNTED)
    mine = waiting.filter(owner=owner).aggregate(jobs=Count("pk"), seconds=Sum("estimated_seconds", default=0.0))

    most = limits["MAX_QUEUED_JOBS_PER_PERSON"]
    if mine["jobs"] >= most:
        drain = _drain_of(owner, most, now)
        raise TooBusy(
            f"you have {mine['jobs']} jobs waiting and {most} may wait: let some finish or cancel some, then try again",
            code="too_many_jobs",
            retry_after_seconds=_wait(mine["jobs"] - most + most * ROOM_SHARE, drain.jobs, drain.over_seconds),
        )
    longest, total = limits["MAX_QUEUED_SECONDS_PER_PERSON"], mine["seconds"] + estimated_seconds
    # A long job that waits alone is let in: refused, it could never run.
    if mine["jobs"] and total > longest:
        drain = _drain_of(owner, most, now)
        raise TooBusy(
            f"your {mine['jobs']} waiting jobs and this one would take about {total:.0f} worker seconds and "
            f"{longest:.0f} may wait: let some finish or cancel some, or ask for less (fewer steps or pictures)",
            code="too_much_work",
            retry_after_seconds=_wait(total - longest, drain.estimated_seconds, drain.over_seconds),
        )
    everybody, most = waiting.count(), limits["MAX_QUEUED_JOBS"]
    if everybody >= most:
        drain = _drain_of_all(now)
        raise TooBusy(
            f"{everybody} jobs of all people wait and {most} may wait: nothing is wrong with your request, "
            "try again later",
            code="queue_full",
            retry_after_seconds=_wait(everybody - most + most * ROOM_SHARE, drain.jobs, drain.over_seconds),
        )


def lock(owner: User) -> datetime:
    """This person's submissions take turns until the transaction ends. Returns the database's time."""
    return usage_lock(owner.pk).now


def refuse_oversized_generation(config: GenerateConfig) -> None:
    """Bound what a single request may ask for.

    Raises:
        InvalidInput: More than `MAX_PIXEL_STEPS`.
    """
    asked = pixel_steps(config)
    if asked > MAX_PIXEL_STEPS:
        raise InvalidInput(
            f"{config.count} pictures of {config.width}x{config.height} px in {config.steps} steps are "
            f"{asked / 1e6:.0f} million pixel steps; one request may have {MAX_PIXEL_STEPS / 1e6:.0f}: "
            "ask for fewer or smaller pictures, or fewer steps, or send several requests"
        )


def refuse_oversized_training(config: TrainConfig) -> None:
    """Bound what a single training may ask for.

    Raises:
        InvalidInput: More than `MAX_PICTURES_SHOWN`.
    """
    shown = config.steps * config.batch_size * config.gradient_accumulation_steps
    if shown > MAX_PICTURES_SHOWN:
        raise InvalidInput(
            f"{config.steps} steps of {config.batch_size}x{config.gradient_accumulation_steps} pictures show {shown} "
            f"pictures; one training may show {MAX_PICTURES_SHOWN}: choose fewer steps or a smaller batch"
        )


def _wait(needed: float, drained: float, over_seconds: float) -> int:
    """Whole seconds until `needed` has probably drained, at the rate of lately."""
    if drained <= 0 or over_seconds <= 0:
        return DEFAULT_WAIT_SECONDS
    return min(LONGEST_WAIT_SECONDS, max(1, math.ceil(max(needed, 1.0) * over_seconds / drained)))


def _drain_of(owner: User, limit: int, now: datetime) -> Drain:
    """Of one person. Looks at their newest jobs only: what ended lately is right behind what waits."""
    newest = (
        Job.objects.filter(owner=owner, kind__in=COUNTED)
        .order_by("-created_at")
        .values_list("finished_at", "estimated_seconds")[: 4 * limit]
    )
    ended = [
        seconds
        for finished_at, seconds in newest
        if finished_at and (now - finished_at).total_seconds() < LATELY_SECONDS
    ]
    return Drain(len(ended), sum(ended), LATELY_SECONDS)


def _drain_of_all(now: datetime) -> Drain:
    """Of all people, from the newest events by primary key: cheap whatever the history, and while many are refused."""
    newest = list(JobEvent.objects.order_by("-id").values_list("at", "new_state")[:LATELY_EVENTS])
    recent = [state for at, state in newest if (now - at).total_seconds() < LATELY_SECONDS]
    if not recent:
        return Drain(0, 0.0, LATELY_SECONDS)
    # A busy site's newest events cover less than the window.
    over = LATELY_SECONDS if len(newest) < LATELY_EVENTS else min(LATELY_SECONDS, (now - newest[-1][0]).total_seconds())
    return Drain(sum(state in TERMINAL for state in recent), 0.0, max(over, 1.0))
