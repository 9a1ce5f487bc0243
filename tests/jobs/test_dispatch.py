"""The dispatcher against a real Valkey server: rings what is needed, not more, and outlives its broker."""

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs.dispatch import Dispatcher, leader
from jobs.doorbells import Doorbells
from jobs.models import Job, LeaderLease, User, WorkerProcess
from jobs.status import JobKind, JobState
from jobs.workers import worker_register
from tests.factories import claim_one, take
from tests.jobs.conftest import MakeJob, app_for, expire_lease
from tests.services import valkey


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def broker(broker_url: str) -> redis.Redis:
    client = redis.Redis.from_url(broker_url)
    client.flushall()
    return client


@pytest.fixture
def dispatcher(broker: redis.Redis, broker_url: str) -> Dispatcher:
    return Dispatcher(Doorbells(app_for(broker_url)))


def lying(broker: redis.Redis, queue: str) -> list[str]:
    return [json.loads(message)["headers"]["task"] for message in broker.lrange(f"lorasite:{queue}", 0, -1)]


def test_nothing_is_rung_without_workers(dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob) -> None:
    make_job()
    dispatcher.tick()
    assert lying(broker, "gpu") == []


def test_each_kind_that_waits_is_rung_on_its_queue(
    dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob
) -> None:
    worker_register(queues=["gpu", "cpu"], device="cpu")
    make_job(kind=JobKind.TRAIN)
    make_job(kind=JobKind.PREPROCESS)
    dispatcher.tick()
    assert lying(broker, "gpu") == ["jobs.tasks.train"]
    assert lying(broker, "cpu") == ["jobs.tasks.preprocess"]


def test_a_hundred_waiting_jobs_do_not_flood_the_broker(
    dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob
) -> None:
    worker_register(queues=["gpu"], device="cpu")
    for _ in range(100):
        make_job()
    for _ in range(5):
        dispatcher.tick()
    assert len(lying(broker, "gpu")) == 2


def test_a_doorbell_has_no_arguments(dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob) -> None:
    worker_register(queues=["gpu"], device="cpu")
    make_job()
    dispatcher.tick()
    message = json.loads(broker.lrange("lorasite:gpu", 0, 0)[0])
    assert message["headers"]["argsrepr"] == "()"
    assert message["headers"]["kwargsrepr"] == "{}"


def test_an_emptied_broker_is_rung_again(dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob) -> None:
    worker_register(queues=["gpu"], device="cpu")
    make_job()
    dispatcher.tick()
    broker.flushall()
    dispatcher.tick()
    assert lying(broker, "gpu") == ["jobs.tasks.generate"]


def test_foreign_messages_in_the_queue_harm_nothing(
    dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob
) -> None:
    worker_register(queues=["gpu"], device="cpu")
    make_job()
    broker.lpush("lorasite:gpu", b"\x80\x04not json", b"[]", b'{"headers": 3}')
    dispatcher.tick()
    waiting = broker.lrange("lorasite:gpu", 0, -1)
    assert sum(b"jobs.tasks.generate" in message for message in waiting) == 1


def test_the_dispatcher_outlives_a_broker_that_is_not_there(make_job: MakeJob) -> None:
    worker_register(queues=["gpu"], device="cpu")
    job = make_job()
    dispatcher = Dispatcher(Doorbells(app_for("redis://127.0.0.1:1/0")))
    dispatcher.tick()
    dispatcher.tick()
    job.refresh_from_db()
    assert job.state == JobState.QUEUED


@pytest.mark.django_db
def test_a_frozen_broker_does_not_stop_the_sweep(tmp_path: Path, make_job: MakeJob, worker: WorkerProcess) -> None:

    with valkey(tmp_path / "valkey") as url:
        server = int(redis.Redis.from_url(url).info("server")["process_id"])
        dispatcher = Dispatcher(Doorbells(app_for(url)))
        lost = make_job()
        claim = claim_one(kinds=[JobKind.GENERATE], worker=worker)
        assert claim is not None
        expire_lease(lost)
        os.kill(server, signal.SIGSTOP)
        try:
            dispatcher.tick()
        finally:
            os.kill(server, signal.SIGCONT)
    assert Job.objects.get(pk=lost.pk).state == JobState.QUEUED


def test_of_two_dispatchers_one_leads_and_the_other_takes_over(
    make_job: MakeJob, broker: redis.Redis, broker_url: str
) -> None:
    first, second = (Dispatcher(Doorbells(app_for(broker_url))) for _ in range(2))
    second.holder += "-second"
    worker_register(queues=["gpu"], device="cpu")
    first.tick()
    make_job()
    second.tick()
    assert lying(broker, "gpu") == []
    assert LeaderLease.objects.get().holder == first.holder
    first.step_down()
    second._beat_due = 0.0
    second.tick()
    assert LeaderLease.objects.get().holder == second.holder
    assert lying(broker, "gpu") == ["jobs.tasks.generate"]


def test_the_age_of_the_last_beat_is_known(dispatcher: Dispatcher, db: None) -> None:
    assert leader() is None
    dispatcher.tick()
    found = leader()
    assert found is not None and 0 <= found.age_seconds < 5


def test_two_thousand_waiting_jobs_do_not_flood_the_broker(
    dispatcher: Dispatcher, broker: redis.Redis, person: User
) -> None:
    for _ in range(3):
        worker_register(queues=["gpu"], device="cpu")
    Job.objects.bulk_create(
        Job(owner=person, kind=kind, spec={}, spec_hash="") for kind in (JobKind.GENERATE, JobKind.TRAIN) * 1000
    )
    for _ in range(5):
        dispatcher.tick()
        dispatcher.tick({"generate": 500})
    assert len(lying(broker, "gpu")) == 6


def test_what_was_announced_is_rung_before_anything_is_counted(
    dispatcher: Dispatcher, broker: redis.Redis, make_job: MakeJob, settings: Any
) -> None:
    settings.LORASITE = settings.LORASITE | {"DISPATCH_SECONDS": 60.0}
    worker_register(queues=["gpu"], device="cpu")
    dispatcher.tick()
    make_job()
    with CaptureQueriesContext(connection) as queries:
        dispatcher.tick({"generate": 1})
    assert lying(broker, "gpu") == ["jobs.tasks.generate"]
    assert not [query for query in queries if 'FROM "jobs_job"' in query["sql"] and "COUNT" in query["sql"]]


def test_a_leader_that_was_paused_for_longer_than_its_lease_does_not_act(
    dispatcher: Dispatcher, broker: redis.Redis, broker_url: str, make_job: MakeJob
) -> None:
    dispatcher.tick()
    LeaderLease.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    second = Dispatcher(Doorbells(app_for(broker_url)))
    second.tick()
    worker_register(queues=["gpu"], device="cpu")
    make_job()
    # It sleeps until after its lease; its next beat would not be due for long.
    dispatcher._lead_ends, dispatcher._beat_due = time.monotonic() - 0.001, time.monotonic() + 60
    dispatcher._children_due = 0.0
    dispatcher.tick({"generate": 1})
    assert lying(broker, "gpu") == []
    assert LeaderLease.objects.get().holder == second.holder


def test_a_broken_rule_keeps_neither_doorbells_nor_the_other_rules_from_their_work(
    dispatcher: Dispatcher,
    broker: redis.Redis,
    make_job: MakeJob,
    worker: WorkerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> int:
        raise ValueError("a bug")

    monkeypatch.setattr("jobs.dispatch.dead_workers_close", broken)
    lost = make_job()
    assert take(lost, worker) is not None
    expire_lease(lost)
    dispatcher.tick()
    assert Job.objects.get(pk=lost.pk).state == JobState.QUEUED


def test_who_leads_is_shown(dispatcher: Dispatcher, db: None, client: Any) -> None:
    dispatcher.tick()
    found = client.get("/readyz").json()["dispatcher"]
    assert found["leader"] == dispatcher.holder
    assert 0 <= found["heard_seconds_ago"] < 30


def test_a_leader_that_is_gone_without_a_word_is_followed_within_seconds(
    dispatcher: Dispatcher, broker_url: str, db: None
) -> None:
    dispatcher.tick()
    second = Dispatcher(Doorbells(app_for(broker_url)))
    end = time.monotonic() + 15  # the lease is 4 s, and machines that test are busy
    while LeaderLease.objects.get().holder != second.holder and time.monotonic() < end:
        second.tick()
        time.sleep(0.1)
    assert LeaderLease.objects.get().holder == second.holder
