"""The heartbeat: leases stay, progress arrives, wishes come back, and silence stops the work in time."""

import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from django.conf import settings

from core import failpoints
from core.errors import Cancelled, Paused
from core.progress import Progress
from jobs import lifecycle
from jobs.heartbeat import Fenced, Heartbeat, Hold, Preempted
from jobs.models import Job, JobPreview, WorkerProcess
from jobs.status import JobKind
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob, expire_lease


@pytest.fixture
def held(make_job: MakeJob, worker: WorkerProcess) -> Iterator[tuple[Heartbeat, Hold]]:
    make_job()
    claim = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    assert claim is not None
    heartbeat = Heartbeat(worker, warm_bases=lambda: ["abc"])
    yield heartbeat, heartbeat.take(claim)


def test_a_beat_renews_the_lease_and_writes_the_newest_progress(held: tuple[Heartbeat, Hold]) -> None:
    heartbeat, hold = held
    expire_lease(hold.job)
    before = Job.objects.get(pk=hold.job.pk).lease_until
    for step in (1, 2, 3):
        hold.report(Progress(stage="training", step=step, total=9, figures={"loss": 0.5}))
    heartbeat.beat()
    job = Job.objects.get(pk=hold.job.pk)
    assert job.lease_until > before
    assert (job.stage, job.progress_step, job.progress_total, job.figures) == ("training", 3, 9, {"loss": 0.5})


def test_a_stage_without_figures_keeps_the_last_ones(held: tuple[Heartbeat, Hold]) -> None:
    heartbeat, hold = held
    hold.report(Progress(stage="training", step=9, total=9, figures={"loss": 0.25}))
    heartbeat.beat()
    hold.report(Progress(stage="drawing samples", step=1, total=4))
    heartbeat.beat()
    job = Job.objects.get(pk=hold.job.pk)
    assert (job.stage, job.figures) == ("drawing samples", {"loss": 0.25})


def test_a_beat_says_that_the_worker_lives_and_what_is_warm(held: tuple[Heartbeat, Hold]) -> None:
    heartbeat, hold = held
    worker = hold.job.worker
    before = WorkerProcess.objects.get(pk=worker.pk).heartbeat_at
    heartbeat.beat()
    after = WorkerProcess.objects.get(pk=worker.pk)
    assert after.heartbeat_at >= before
    assert after.warm_bases == ["abc"]


def test_a_cancel_wish_stops_the_work_at_its_next_step(held: tuple[Heartbeat, Hold]) -> None:
    heartbeat, hold = held
    lifecycle.job_cancel(job=hold.job)
    heartbeat.beat()
    with pytest.raises(Cancelled):
        hold.report(Progress(stage="training", step=1, total=9))


def test_a_taken_lease_fences_the_work_at_its_next_step(held: tuple[Heartbeat, Hold], worker: WorkerProcess) -> None:
    heartbeat, hold = held
    expire_lease(hold.job)
    assert claim_one(kinds=[JobKind.GENERATE], worker=worker) is not None
    heartbeat.beat()
    with pytest.raises(Fenced):
        hold.report(Progress(stage="training", step=1, total=9))


def test_work_that_cannot_renew_stops_before_its_lease_can_have_run_out(
    held: tuple[Heartbeat, Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hold = held
    monkeypatch.setitem(settings.LORASITE, "LEASE_SECONDS", 0.0)
    with pytest.raises(Fenced):
        hold.report(Progress(stage="training", step=1, total=9))


def test_a_wish_for_room_reaches_a_training_at_its_next_step_as_a_pause(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = make_job(kind=JobKind.TRAIN)
    claim = claim_one(kinds=[JobKind.TRAIN], worker=worker)
    assert claim is not None
    heartbeat = Heartbeat(worker)
    hold = heartbeat.take(claim)
    hold.report(Progress(stage="training", step=1, total=9))
    Job.objects.filter(pk=job.pk).update(yield_requested_at=job.created_at)
    heartbeat.beat()
    with pytest.raises(Preempted) as preempted:
        hold.report(Progress(stage="training", step=2, total=9))
    assert isinstance(preempted.value, Paused), "so the training saves a checkpoint first"


def test_a_job_that_this_process_lost_and_claimed_anew_is_two_holds_of_which_the_first_is_fenced(
    held: tuple[Heartbeat, Hold], worker: WorkerProcess
) -> None:
    heartbeat, first = held
    expire_lease(first.job)
    claim = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    assert claim is not None
    second = heartbeat.take(claim)
    heartbeat.let_go(first)
    assert heartbeat.holds() == [second]
    with pytest.raises(Fenced):
        first.check()
    heartbeat.beat()
    second.check()


def test_a_beat_shows_the_newest_preview_and_none_of_a_lost_lease(held: tuple[Heartbeat, Hold]) -> None:
    heartbeat, hold = held
    heartbeat.beat()
    assert (JobPreview.objects.count(), hold.has_preview) == (0, False)
    for step in (1, 2):
        hold.report(Progress(stage="denoising", step=step, total=9, preview=b"look %d" % step))
    heartbeat.beat()
    preview = JobPreview.objects.get(job=hold.job)
    assert (preview.step, bytes(preview.jpeg), preview.token, hold.has_preview) == (2, b"look 2", hold.token, True)
    hold.report(Progress(stage="denoising", step=3, total=9, preview=b"too late"))
    Job.objects.filter(pk=hold.job.pk).update(token=hold.token + 1)
    heartbeat.beat()
    assert JobPreview.objects.get(job=hold.job).step == 2


@pytest.mark.django_db(transaction=True)
def test_leases_are_renewed_after_a_beat_that_failed_in_any_way(
    held: tuple[Heartbeat, Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, hold = held
    hold.report(Progress(stage="denoising", step=1, total=9, preview=b"look"))
    monkeypatch.setitem(settings.LORASITE, "HEARTBEAT_SECONDS", 0.02)
    failures: list[str] = []

    def fail_once(point: str) -> None:
        if point == "preview.write:before" and not failures:
            failures.append(point)
            raise ValueError("nobody expects this")

    def renewed_after(moment: datetime | None) -> bool:
        for _ in range(500):
            hold.job.refresh_from_db()
            if failures and moment and hold.job.lease_until and hold.job.lease_until > moment:
                return True
            time.sleep(0.01)
        return False

    failpoints.install(fail_once)
    try:
        heartbeat.start()
        assert renewed_after(hold.job.lease_until)
        assert renewed_after(hold.job.lease_until), "and again, after the failure"
    finally:
        failpoints.install(None)
        heartbeat.stop()
    assert failures == ["preview.write:before"]
