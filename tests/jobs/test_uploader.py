"""The uploader: no outage of the store fails a job or keeps the process from computing, and no zombie publishes."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.core.files.storage import storages
from django.db import connection
from django.test import override_settings

from core.progress import Progress
from jobs import lifecycle
from jobs.artifacts import artifact_put, hash_stream
from jobs.backoff import Backoff
from jobs.drain import drain, run
from jobs.errors import ArtifactMissing
from jobs.heartbeat import Heartbeat, Hold
from jobs.leases import checkpoint_record
from jobs.models import Job, JobAttempt, User, WorkerProcess
from jobs.scratch import scratch_open
from jobs.status import AttemptOutcome, JobKind, JobState
from jobs.uploader import Upload, Uploader
from jobs.worker_context import ShutdownFlag, WorkerContext, enter
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob, expire_lease
from tests.jobs.storages import OUTAGE, Outage

pytestmark = pytest.mark.django_db(transaction=True)


class Painting:
    """Computes a file, stores it, records nothing but that it did."""

    recorded: list[str] = []

    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def compute(self) -> None:
        self.path = scratch_open(self.hold) / "picture"
        self.path.write_bytes(str(self.hold.job.pk).encode())
        self.hold.report(Progress(stage="painting", step=1, total=1))

    def files(self) -> list[Path]:
        return [self.path]

    def store(self) -> None:
        self.sha256, _ = artifact_put(self.path)

    def record(self) -> None:
        Painting.recorded.append(self.sha256)
        Job.objects.filter(pk=self.hold.job.pk).update(priority=7)


@pytest.fixture
def outage() -> Iterator[Outage]:
    stores = settings.STORAGES | {
        "default": settings.STORAGES["default"] | {"BACKEND": "tests.jobs.storages.FlakyStorage"}
    }
    OUTAGE.is_on, OUTAGE.refused = False, 0
    OUTAGE.was_refused.clear()
    Painting.recorded = []
    with override_settings(STORAGES=stores):
        yield OUTAGE
    OUTAGE.is_on = False


@pytest.fixture
def running(
    transactional_db: None, worker: WorkerProcess, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerContext]:
    """This process as a worker child with its real threads, quick enough for a test."""
    monkeypatch.setitem(settings.LORASITE, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("jobs.uploader.Backoff", lambda: Backoff(first_seconds=0.05, cap_seconds=0.1))
    monkeypatch.setattr("jobs.uploader.LOOK_SECONDS", 0.05)
    shutdown = ShutdownFlag()
    heartbeat = Heartbeat(worker, shutting_down=lambda: shutdown.is_raised)
    context = WorkerContext(worker, heartbeat, shutdown, Uploader(heartbeat, most_pending=3), end_process=exits.append)
    enter(context)
    heartbeat.start()
    context.uploader.start()
    yield context
    monkeypatch.setattr("jobs.worker_context.LAST_UPLOADS_SECONDS", 0.0)
    context.go()
    for thread in threading.enumerate():
        if thread.name in ("uploader", "heartbeat"):
            thread.join(timeout=10)


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never came to this: {what}"
        time.sleep(0.02)


def states() -> list[str]:
    return list(Job.objects.order_by("created_at").values_list("state", flat=True))


def take(context: WorkerContext, kind: JobKind = JobKind.GENERATE) -> Hold:
    claim = claim_one(kinds=[kind], worker=context.worker)
    assert claim is not None
    return context.heartbeat.take(claim)


def test_the_default_store_is_the_flaky_one(outage: Outage) -> None:
    outage.is_on = True
    with pytest.raises(ConnectionError):
        storages["default"].exists("x")


def test_an_outage_of_the_store_fails_no_job_and_the_process_computes_on_meanwhile(
    make_job: MakeJob, running: WorkerContext, outage: Outage
) -> None:
    outage.is_on = True
    for _ in range(2):
        make_job()
    drain(JobKind.GENERATE, Painting)
    assert states() == [JobState.UPLOADING] * 2, "the second was computed while the first waited"
    until(lambda: outage.refused >= 6, "it tries again and again")
    assert states() == [JobState.UPLOADING] * 2
    outage.is_on = False
    until(lambda: states() == [JobState.SUCCEEDED] * 2, "both succeed once the store is back")
    assert len(set(Painting.recorded)) == 2
    assert JobAttempt.objects.count() == 2
    until(lambda: running.heartbeat.holds() == [], "the leases are let go")


def test_the_lease_is_renewed_for_as_long_as_the_results_wait(
    make_job: MakeJob, running: WorkerContext, outage: Outage
) -> None:
    outage.is_on = True
    make_job()
    drain(JobKind.GENERATE, Painting)
    outage.was_refused.wait(10)
    handed_over = Job.objects.get()
    assert handed_over.lease_until is not None
    until(lambda: Job.objects.filter(lease_until__gt=handed_over.lease_until).exists(), "the heartbeat renews it", 8)
    assert (handed_over.state, handed_over.token) == (JobState.UPLOADING, Job.objects.get().token)


def test_a_job_waits_for_the_store_past_its_budget_and_says_so(
    make_job: MakeJob, running: WorkerContext, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jobs.uploader.Backoff", lambda: Backoff(first_seconds=0.01, cap_seconds=0.05, budget_seconds=0.1)
    )
    outage.is_on = True
    job = make_job()
    drain(JobKind.GENERATE, Painting)
    until(lambda: outage.refused > 20, "several budgets are spent")
    until(lambda: "storing, again" in Job.objects.get(pk=job.pk).stage, "the row says what it waits for")
    assert states() == [JobState.UPLOADING]


def test_a_cancel_is_heard_while_the_results_wait(make_job: MakeJob, running: WorkerContext, outage: Outage) -> None:
    outage.is_on = True
    job = make_job()
    drain(JobKind.GENERATE, Painting)
    outage.was_refused.wait(10)
    lifecycle.job_cancel(job=job)
    until(lambda: states() == [JobState.CANCELLED], "it ends")
    assert Painting.recorded == []
    until(lambda: running.heartbeat.holds() == [], "the lease is let go")


def test_a_job_that_was_taken_over_while_its_results_waited_publishes_nothing(
    make_job: MakeJob, running: WorkerContext, outage: Outage
) -> None:
    outage.is_on = True
    job = make_job()
    drain(JobKind.GENERATE, Painting)
    outage.was_refused.wait(10)
    successor = None
    while successor is None:  # The heartbeat may renew between the two statements.
        expire_lease(job)
        successor = claim_one(kinds=[JobKind.GENERATE], worker=running.worker)
    until(lambda: running.heartbeat.holds() == [], "the zombie lets go")
    outage.is_on = False
    time.sleep(0.3)
    assert Painting.recorded == []
    now = Job.objects.get(pk=job.pk)
    assert (now.state, now.token) == (JobState.RUNNING, successor.token)


def test_an_artifact_that_vanished_before_the_record_is_stored_again(
    make_job: MakeJob, running: WorkerContext, outage: Outage
) -> None:
    class Collected(Painting):
        stores = 0

        def store(self) -> None:
            Collected.stores += 1
            super().store()

        def record(self) -> None:
            if Collected.stores == 1:
                raise ArtifactMissing("collected meanwhile")
            super().record()

    make_job()
    drain(JobKind.GENERATE, Collected)
    until(lambda: states() == [JobState.SUCCEEDED], "it succeeds")
    assert Collected.stores == 2


def test_a_process_with_too_many_waiting_results_computes_nothing_new(
    make_job: MakeJob, running: WorkerContext, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.LORASITE, "DRAIN_SECONDS", 1.5)
    monkeypatch.setitem(settings.LORASITE, "MAX_RUNNING_GENERATIONS_PER_PERSON", 10)
    outage.is_on = True
    for _ in range(5):
        make_job()
    drain(JobKind.GENERATE, Painting)
    assert states().count(JobState.UPLOADING) == 3
    assert states().count(JobState.QUEUED) == 2
    outage.is_on = False
    until(lambda: running.uploader.pending_count() == 0, "the results are stored")
    drain(JobKind.GENERATE, Painting)
    until(lambda: states() == [JobState.SUCCEEDED] * 5, "the rest follows")


def test_a_process_that_goes_gives_back_what_it_could_not_store(
    make_job: MakeJob, running: WorkerContext, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.worker_context.LAST_UPLOADS_SECONDS", 0.3)
    outage.is_on = True
    job = make_job()
    drain(JobKind.GENERATE, Painting)
    began = time.monotonic()
    running.go()
    assert time.monotonic() - began < 10
    assert states() == [JobState.QUEUED]
    assert job.attempts.get().outcome == AttemptOutcome.RELEASED
    assert Job.objects.get().barren_losses == 0


def checkpoint_upload(hold: Hold, folder: Path, step: int) -> Upload:
    path = folder / f"checkpoint-{step}"
    path.write_bytes(f"{hold.job.pk} {step}".encode())

    def attempt() -> None:
        hold.check()
        sha256, _ = artifact_put(path)
        checkpoint_record(job_id=hold.job.pk, token=hold.token, step=step, files={"state": sha256})

    return Upload(hold, attempt, is_result=False)


def test_a_training_goes_on_while_the_store_is_away_and_only_its_newest_checkpoint_is_stored(
    make_job: MakeJob, running: WorkerContext, outage: Outage, tmp_path: Path
) -> None:
    outage.is_on = True
    make_job(kind=JobKind.TRAIN)
    hold = take(running, JobKind.TRAIN)
    for step in (1, 2, 3):
        upload = running.uploader.add(checkpoint_upload(hold, tmp_path, step))
    assert not running.uploader.wait_for(upload, 0.3)
    assert Job.objects.get().checkpoint_step == 0
    outage.is_on = False
    assert running.uploader.wait_for(upload, 10)
    job = Job.objects.get()
    with (tmp_path / "checkpoint-3").open("rb") as newest:
        assert (job.checkpoint_step, job.checkpoint) == (3, {"state": hash_stream(newest)[0]})
    assert job.state == JobState.RUNNING


def test_a_checkpoint_that_arrives_after_its_try_has_ended_changes_nothing(
    make_job: MakeJob, running: WorkerContext, outage: Outage, tmp_path: Path
) -> None:
    make_job(kind=JobKind.TRAIN)
    hold = take(running, JobKind.TRAIN)
    lifecycle.job_release(job_id=hold.job.pk, token=hold.token, reason="given back")
    upload = running.uploader.add(checkpoint_upload(hold, tmp_path, 7))
    assert not running.uploader.wait_for(upload, 10)
    assert upload.is_done.is_set()
    assert Job.objects.get().checkpoint_step == 0


def test_results_that_an_outage_keeps_longer_than_the_lease_are_computed_by_another(
    make_job: MakeJob, worker: WorkerProcess, outage: Outage, exits: list[int], person: User
) -> None:
    """The whole process is cut off: nobody renews, so the next claim takes the job back to its last checkpoint."""
    shutdown = ShutdownFlag()
    heartbeat = Heartbeat(worker)
    cut_off = WorkerContext(worker, heartbeat, shutdown, end_process=exits.append)
    enter(cut_off)
    outage.is_on = True
    job = make_job()
    run([take(cut_off)], Painting)
    cut_off.uploader.turn()
    expire_lease(job)
    successor = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    assert successor is not None
    outage.is_on = False
    time.sleep(0.6)
    cut_off.uploader.turn()
    assert Job.objects.get().priority == 0, "what it recorded is rolled back with its end"
    assert [attempt.outcome for attempt in job.attempts.all()] == [AttemptOutcome.LOST, ""]
    connection.close()
