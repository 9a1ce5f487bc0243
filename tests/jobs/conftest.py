"""Fixtures of the lifecycle tests: one person, one worker, jobs without request rows."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from django.utils import timezone
from kombu import Queue
from pytest_django.fixtures import Settings

from jobs import worker_context
from jobs.heartbeat import Heartbeat
from jobs.models import Job, User, WorkerProcess
from jobs.status import JobKind
from jobs.submission import job_submit
from jobs.worker_context import ShutdownFlag, WorkerContext
from jobs.workers import worker_register

MakeJob = Callable[..., Job]


@pytest.fixture
def person(db: None) -> User:
    return User.objects.create_user("lifecycle-person")


@pytest.fixture
def worker(db: None) -> WorkerProcess:
    return worker_register(queues=["gpu"], device="cpu")


@pytest.fixture
def exits() -> list[int]:
    """Codes with which the worker process of a test ended."""
    return []


@pytest.fixture
def context(worker: WorkerProcess, exits: list[int]) -> Iterator[WorkerContext]:
    """This process as a worker child whose threads do not run: a test takes their turns."""
    shutdown = ShutdownFlag()
    heartbeat = Heartbeat(worker, shutting_down=lambda: shutdown.is_raised)
    context = WorkerContext(worker, heartbeat, shutdown, end_process=exits.append)
    worker_context.enter(context)
    yield context
    context.uploader.close(0)


@pytest.fixture
def make_job(person: User, settings: Settings) -> MakeJob:
    """Submits a generate job; keyword arguments go to `job_submit`. One person may have as many as a test wants."""
    settings.LORASITE = {**settings.LORASITE, "MAX_QUEUED_JOBS_PER_PERSON": 10_000}

    def make(**values: Any) -> Job:
        values = {"owner": person, "kind": JobKind.GENERATE, "spec": {}, "attach": lambda job: None} | values
        return job_submit(**values)

    return make


def expire_lease(job: Job) -> None:
    """As if the worker had been silent for longer than its lease."""
    Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=5))


def app_for(url: str) -> Celery:
    """A Celery app with the product's queues, on this broker."""
    app = Celery("test", broker=url, set_as_current=False)
    app.conf.update(
        broker_transport_options={"global_keyprefix": "lorasite:", "socket_timeout": 1},
        broker_connection_timeout=1,
        task_queues=[Queue("gpu"), Queue("cpu")],
        task_create_missing_queues=False,
    )
    return app
