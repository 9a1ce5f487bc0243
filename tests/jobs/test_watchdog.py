"""The watchdog: a step that never ends costs the process; patience is granted where silence is normal."""

import threading
import time
from pathlib import Path

import pytest
from django.conf import settings

from core import failpoints
from jobs.heartbeat import Hold
from jobs.models import Job
from jobs.status import AttemptOutcome, JobKind, JobState
from jobs.watchdog import EXIT_STUCK, Watchdog
from jobs.worker_context import WorkerContext
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob


def take(context: WorkerContext) -> Hold:
    claim = claim_one(kinds=[JobKind.GENERATE], worker=context.worker)
    assert claim is not None
    return context.heartbeat.take(claim)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.LORASITE, "STEP_SECONDS", 0.1)


@pytest.mark.django_db(transaction=True)
def test_a_stuck_step_closes_its_try_at_once_and_ends_the_process(
    make_job: MakeJob, context: WorkerContext, exits: list[int], impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    make_job()
    make_job()
    stuck, waiting = take(context), take(context)
    watchdog = Watchdog(context.heartbeat, end_process=exits.append)
    with stuck.computing():
        assert not watchdog.look()
        time.sleep(0.15)
        assert watchdog.look()
    assert exits == [EXIT_STUCK]
    lost, released = (Job.objects.get(pk=hold.job.pk) for hold in (stuck, waiting))
    assert (lost.state, lost.attempts.get().outcome) == (JobState.QUEUED, AttemptOutcome.LOST)
    assert lost.attempts.get().reason == "no step for 0.1 s"
    assert (released.state, released.attempts.get().outcome) == (JobState.QUEUED, AttemptOutcome.RELEASED)
    assert "Current thread" in capfd.readouterr().err, "all stacks are in the log"


@pytest.mark.django_db(transaction=True)
def test_the_thread_itself_finds_the_stuck_step(
    make_job: MakeJob, context: WorkerContext, exits: list[int], impatient: None
) -> None:
    make_job()
    hold = take(context)
    ended = threading.Event()

    def end(code: int) -> None:
        exits.append(code)
        ended.set()

    watchdog = Watchdog(context.heartbeat, end_process=end)
    with hold.computing():
        watchdog.start()
        assert ended.wait(10)
    watchdog.stop()
    assert exits == [EXIT_STUCK]
    assert Job.objects.get().state == JobState.QUEUED


@pytest.mark.django_db(transaction=True)
def test_a_watchdog_that_failed_looks_again(
    make_job: MakeJob, context: WorkerContext, exits: list[int], impatient: None
) -> None:
    make_job()
    hold = take(context)
    ended = threading.Event()

    def end(code: int) -> None:
        exits.append(code)
        if len(exits) == 1:
            raise RuntimeError("the first time goes wrong")
        ended.set()

    watchdog = Watchdog(context.heartbeat, end_process=end)
    with hold.computing():
        watchdog.start()
        assert ended.wait(10)
    watchdog.stop()
    assert exits == [EXIT_STUCK, EXIT_STUCK]


def test_results_that_wait_for_the_store_are_not_stuck(
    make_job: MakeJob, context: WorkerContext, exits: list[int], impatient: None
) -> None:
    make_job()
    hold = take(context)
    with hold.computing():
        pass
    time.sleep(0.15)
    assert not Watchdog(context.heartbeat, end_process=exits.append).look()
    assert exits == []


def test_a_long_download_is_not_stuck_and_the_step_after_it_may_be(
    make_job: MakeJob, context: WorkerContext, exits: list[int], impatient: None, tmp_path: Path
) -> None:
    make_job()
    hold = take(context)
    watchdog = Watchdog(context.heartbeat, end_process=exits.append)
    looks: list[bool] = []

    def download(sha256: str) -> Path:
        time.sleep(0.15)
        looks.append(watchdog.look())
        return tmp_path

    with hold.computing():
        assert hold.watched(download)("0" * 64) == tmp_path
        assert looks == [False]
        time.sleep(0.15)
        assert hold.overdue_seconds() > 0


@pytest.mark.django_db(transaction=True)
def test_a_process_whose_heartbeat_hangs_begins_no_job_and_is_replaced_when_it_hangs_for_long(
    make_job: MakeJob, context: WorkerContext, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.LORASITE, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setitem(settings.LORASITE, "LEASE_SECONDS", 0.4)
    make_job()
    hold = take(context)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(point: str) -> None:
        if point == "lease.commit:before" and threading.current_thread().name == "heartbeat":
            hangs.set()
            goes_on.wait(10)

    failpoints.install(hang)
    watchdog = Watchdog(context.heartbeat, end_process=exits.append)
    context.heartbeat.start()
    try:
        assert hangs.wait(10)
        assert context.may_claim()
        time.sleep(0.25)
        assert not context.may_claim()
        assert not watchdog.look(), "a step may take longer than that"
        monkeypatch.setitem(settings.LORASITE, "STEP_SECONDS", 0.1)
        assert watchdog.look()
    finally:
        failpoints.install(None)
        goes_on.set()
        context.heartbeat.stop()
    assert exits == [EXIT_STUCK]
    assert context.may_claim()
    job = Job.objects.get(pk=hold.job.pk)
    assert (job.state, job.attempts.get().outcome) == (JobState.QUEUED, AttemptOutcome.RELEASED)
