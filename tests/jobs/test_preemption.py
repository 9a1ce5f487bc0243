"""A training makes room exactly when somebody waits impatiently and nobody else is free."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.utils import timezone

from jobs.models import Job, WorkerProcess
from jobs.preemption import Training, trainings_ask_to_yield, trainings_to_ask
from jobs.status import JobKind
from jobs.workers import worker_ready, worker_register
from tests.factories import take
from tests.jobs.conftest import MakeJob

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def training(*, age: float = 600, yielded: float | None = None, asked: bool = False, queue: str = "gpu") -> Training:
    return Training(
        job_id=uuid4(),
        token=1,
        queues=frozenset({queue}),
        since=NOW - timedelta(seconds=age),
        yielded_at=None if yielded is None else NOW - timedelta(seconds=yielded),
        asked=asked,
    )


def chosen(*trainings: Training, waiting: int = 1, free: int = 0) -> list[Training]:
    return trainings_to_ask(trainings, waiting=waiting, free=free, queue="gpu", now=NOW)


def test_as_many_are_asked_as_jobs_wait() -> None:
    trainings = [training() for _ in range(4)]
    assert [len(chosen(*trainings, waiting=count)) for count in (0, 1, 3, 9)] == [0, 1, 3, 4]


def test_free_workers_and_those_asked_before_count() -> None:
    trainings = [training(), training(), training(asked=True)]
    assert len(chosen(*trainings, waiting=2, free=1)) == 0
    assert len(chosen(*trainings, waiting=2)) == 1
    assert not any(one.asked for one in chosen(*trainings, waiting=9))


def test_nobody_is_interrupted_twice_within_a_minute_or_right_after_the_start() -> None:
    assert chosen(training(age=59)) == []
    assert chosen(training(age=600, yielded=59)) == []
    assert len(chosen(training(age=61, yielded=61))) == 1


def test_the_least_recently_interrupted_goes_first_then_the_youngest_try() -> None:
    old, young = training(age=900), training(age=100)
    once, lately = training(yielded=5000), training(yielded=100)
    assert chosen(lately, once, old, young, waiting=4) == [young, old, once, lately]


def test_a_training_elsewhere_is_left_alone() -> None:
    assert chosen(training(queue="trainings")) == []


@pytest.fixture
def busy(worker: WorkerProcess, make_job: MakeJob) -> Job:
    """A ready worker in the middle of a training, and nobody else."""
    worker_ready(worker=worker, warm_bases=[])
    job = make_job(kind=JobKind.TRAIN)
    assert take(job, worker) is not None
    job.attempts.update(started_at=timezone.now() - timedelta(minutes=10))
    return job


def make_wait(make_job: MakeJob, seconds: float = 2.0, **values: Any) -> Job:
    job = make_job(kind=JobKind.GENERATE, **values)
    Job.objects.filter(pk=job.pk).update(queued_at=timezone.now() - timedelta(seconds=seconds))
    return job


def wishes(job: Job) -> bool:
    job.refresh_from_db()
    return job.yield_requested_at is not None


def test_a_training_is_asked_once_when_a_generation_waits(busy: Job, make_job: MakeJob) -> None:
    make_wait(make_job)
    assert trainings_ask_to_yield() == 1
    assert wishes(busy)
    assert trainings_ask_to_yield() == 0


def test_fresh_work_is_left_to_the_next_claim(busy: Job, make_job: MakeJob) -> None:
    make_wait(make_job, seconds=0.0)
    assert trainings_ask_to_yield() == 0


def test_work_that_is_not_due_yet_interrupts_nobody(busy: Job, make_job: MakeJob) -> None:
    job = make_wait(make_job)
    Job.objects.filter(pk=job.pk).update(not_before=timezone.now() + timedelta(minutes=1))
    assert trainings_ask_to_yield() == 0


def test_another_waiting_training_interrupts_nobody(busy: Job, make_job: MakeJob) -> None:
    other = make_job(kind=JobKind.TRAIN)
    Job.objects.filter(pk=other.pk).update(queued_at=timezone.now() - timedelta(hours=1))
    assert trainings_ask_to_yield() == 0


def test_a_free_worker_of_the_queue_spares_the_training(busy: Job, make_job: MakeJob) -> None:
    worker_ready(worker=worker_register(queues=["cpu"], device="cpu"), warm_bases=[])
    make_wait(make_job)
    free = worker_register(queues=["gpu"], device="cpu")
    worker_ready(worker=free, warm_bases=[])
    assert trainings_ask_to_yield() == 0
    WorkerProcess.objects.filter(pk=free.pk).delete()
    assert trainings_ask_to_yield() == 1, "a worker of another queue is of no help"


def test_a_training_that_somebody_cancelled_is_going_anyway(busy: Job, make_job: MakeJob) -> None:
    make_wait(make_job)
    Job.objects.filter(pk=busy.pk).update(cancel_requested_at=timezone.now())
    assert trainings_ask_to_yield() == 0


def test_the_next_try_starts_without_the_wish(busy: Job, make_job: MakeJob, worker: WorkerProcess) -> None:
    from jobs.lifecycle import job_preempted

    make_wait(make_job)
    trainings_ask_to_yield()
    busy.refresh_from_db()
    job_preempted(job_id=busy.pk, token=busy.token, reason="somebody waits")
    assert take(busy, worker) is not None
    assert not wishes(busy)
    assert trainings_ask_to_yield() == 0, "it yielded less than a minute ago"
