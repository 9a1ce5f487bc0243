"""How every end of a piece of work becomes a state: a zoo of works that fail, stop, or lose their lease."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from core.errors import Cancelled, Paused, TrainingDiverged
from core.progress import Progress
from jobs import claims, worker_context
from jobs.drain import drain, run
from jobs.heartbeat import Heartbeat, Hold
from jobs.models import Job, WorkerProcess
from jobs.status import AttemptOutcome, JobKind, JobState
from jobs.worker_context import ShutdownFlag, WorkerContext
from tests.jobs.conftest import MakeJob, expire_lease


class Work:
    """Does nothing, well. Others override one part."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.recorded = False

    def compute(self) -> None:
        self.hold.report(Progress(stage="working", step=1, total=2))

    def store(self) -> None: ...

    def record(self) -> None:
        self.recorded = True


@pytest.fixture
def context(worker: WorkerProcess) -> Iterator[WorkerContext]:
    shutdown = ShutdownFlag()
    context = WorkerContext(worker, Heartbeat(worker, shutting_down=lambda: shutdown.is_raised), shutdown)
    worker_context.enter(context)
    yield context


def take(worker: WorkerProcess) -> Hold:
    claim = claims.job_claim(kinds=[JobKind.GENERATE], worker=worker)
    assert claim is not None
    return Hold(claim, lambda: False)


def run_raising(worker: WorkerProcess, error: BaseException, *, at: str) -> Job:
    class Raising(Work):
        pass

    def fail(self: Any) -> None:
        raise error

    setattr(Raising, at, fail)
    hold = take(worker)
    run(hold, Raising)
    return Job.objects.get(pk=hold.job.pk)


def test_good_work_succeeds_and_is_recorded(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    made: list[Work] = []

    def start(hold: Hold) -> Work:
        made.append(Work(hold))
        return made[0]

    hold = take(worker)
    run(hold, start)
    assert made[0].recorded
    assert Job.objects.get(pk=hold.job.pk).state == JobState.SUCCEEDED


def test_an_expected_error_keeps_its_code_and_sentence(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    job = run_raising(worker, TrainingDiverged("the loss became NaN at step 3"), at="compute")
    assert (job.state, job.error_code, job.error_message) == (JobState.FAILED, "nan", "the loss became NaN at step 3")
    assert job.error_traceback == ""


def test_a_surprise_is_internal_and_its_details_are_for_staff_only(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    job = run_raising(worker, ZeroDivisionError("secret detail"), at="compute")
    assert (job.state, job.error_code) == (JobState.FAILED, "internal")
    assert "secret detail" not in job.error_message
    assert "ZeroDivisionError: secret detail" in job.error_traceback


def test_a_full_disk_is_named(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    assert run_raising(worker, OSError(errno.ENOSPC, "no space"), at="compute").error_code == "disk_full"


def test_a_cancel_ends_as_cancelled(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    assert run_raising(worker, Cancelled("stop"), at="compute").state == JobState.CANCELLED


def test_a_pause_gives_the_job_back(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    job = run_raising(worker, Paused("shutting down"), at="compute")
    assert job.state == JobState.QUEUED
    assert job.attempts.get().outcome == AttemptOutcome.RELEASED


def test_a_store_that_does_not_answer_delays_the_job_instead_of_failing_it(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    make_job()
    job = run_raising(worker, ConnectionError("S3 is away"), at="store")
    assert job.state == JobState.QUEUED
    assert job.not_before is not None
    assert "S3 is away" in job.events.last().reason


def test_a_record_that_fails_leaves_nothing_visible(make_job: MakeJob, worker: WorkerProcess) -> None:
    class HalfRecorded(Work):
        def record(self) -> None:
            Job.objects.filter(pk=self.hold.job.pk).update(priority=7)
            raise RuntimeError("in the middle")

    make_job()
    hold = take(worker)
    run(hold, HalfRecorded)
    job = Job.objects.get(pk=hold.job.pk)
    assert (job.state, job.priority) == (JobState.FAILED, 0)


def test_work_whose_lease_was_taken_records_nothing(make_job: MakeJob, worker: WorkerProcess) -> None:
    recorded: list[bool] = []

    class Overtaken(Work):
        def compute(self) -> None:
            expire_lease(self.hold.job)
            assert claims.job_claim(kinds=[JobKind.GENERATE], worker=worker) is not None

        def record(self) -> None:
            recorded.append(True)

    make_job()
    hold = take(worker)
    run(hold, Overtaken)
    job = Job.objects.get(pk=hold.job.pk)
    assert recorded == []
    assert (job.state, job.token) == (JobState.RUNNING, 2)


def test_a_drain_works_until_nothing_is_left(make_job: MakeJob, context: WorkerContext) -> None:
    jobs = [make_job() for _ in range(3)]
    drain(JobKind.GENERATE, Work)
    assert {Job.objects.get(pk=job.pk).state for job in jobs} == {JobState.SUCCEEDED}


def test_a_drain_stops_claiming_once_the_worker_goes_down(make_job: MakeJob, context: WorkerContext) -> None:
    class LastOne(Work):
        def store(self) -> None:
            context.shutdown.raise_flag()

    jobs = [make_job() for _ in range(3)]
    drain(JobKind.GENERATE, LastOne)
    states = [Job.objects.get(pk=job.pk).state for job in jobs]
    assert states == [JobState.SUCCEEDED, JobState.QUEUED, JobState.QUEUED]


def test_a_job_in_work_is_given_back_at_its_next_step_when_the_worker_goes_down(
    make_job: MakeJob, context: WorkerContext
) -> None:
    class Interrupted(Work):
        def compute(self) -> None:
            context.shutdown.raise_flag()
            super().compute()

    job = make_job()
    drain(JobKind.GENERATE, Interrupted)
    job.refresh_from_db()
    assert job.state == JobState.QUEUED
    assert "shutting down" in job.attempts.get().reason
