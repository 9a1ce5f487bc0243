"""How every end of a piece of work becomes a state: a zoo of works that fail, stop, or lose their lease."""

import errno
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from django.conf import settings
from django.db import OperationalError

from core.errors import Cancelled, Paused, TrainingDiverged
from core.progress import Progress
from core.train_config import TrainConfig
from jobs.claims import jobs_claim
from jobs.drain import Joining, drain, run
from jobs.errors import ArtifactDamaged
from jobs.faults import MAX_STORE_RETRIES
from jobs.heartbeat import Hold
from jobs.models import Job, WorkerProcess
from jobs.status import AttemptOutcome, JobKind, JobState
from jobs.worker_context import EXIT_RECYCLE, WorkerContext
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob, expire_lease


class Work:
    """Does nothing, well. Others override one part."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.recorded = False

    def compute(self) -> None:
        self.hold.report(Progress(stage="working", step=1, total=2))

    def files(self) -> list[Path]:
        return []

    def store(self) -> None: ...

    def record(self) -> None:
        self.recorded = True


def take(context: WorkerContext, kind: JobKind = JobKind.GENERATE) -> Hold:
    claim = claim_one(kinds=[kind], worker=context.worker)
    assert claim is not None
    return context.heartbeat.take(claim)


def run_raising(context: WorkerContext, error: BaseException, *, at: str, kind: JobKind = JobKind.GENERATE) -> Job:
    class Raising(Work):
        pass

    def fail(self: Any) -> None:
        raise error

    setattr(Raising, at, fail)
    hold = take(context, kind)
    run([hold], Raising)
    context.uploader.turn()
    return Job.objects.get(pk=hold.job.pk)


def test_good_work_succeeds_and_is_recorded(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    made: list[Work] = []

    def start(hold: Hold) -> Work:
        made.append(Work(hold))
        return made[0]

    hold = take(context)
    run([hold], start)
    assert Job.objects.get(pk=hold.job.pk).state == JobState.UPLOADING
    assert context.heartbeat.holds() == [hold]
    context.uploader.turn()
    assert made[0].recorded
    assert Job.objects.get(pk=hold.job.pk).state == JobState.SUCCEEDED
    assert context.heartbeat.holds() == []


def test_an_expected_error_keeps_its_code_and_sentence(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    job = run_raising(context, TrainingDiverged("the loss became NaN at step 3"), at="compute")
    assert (job.state, job.error_code, job.error_message) == (JobState.FAILED, "nan", "the loss became NaN at step 3")
    assert job.error_traceback == ""
    assert context.heartbeat.holds() == []


@pytest.mark.parametrize("at", ["compute", "record"])
def test_a_surprise_is_tried_once_more_and_then_fails_with_details_for_staff_only(
    make_job: MakeJob, context: WorkerContext, at: str
) -> None:
    make_job()
    again = run_raising(context, ZeroDivisionError("secret detail"), at=at)
    assert (again.state, again.surprise_retries) == (JobState.QUEUED, 1)
    job = run_raising(context, ZeroDivisionError("secret detail"), at=at)
    assert (job.state, job.error_code) == (JobState.FAILED, "internal")
    reasons = [attempt.reason for attempt in job.attempts.all()]
    assert len(reasons) == 2
    assert "secret detail" not in " ".join([job.error_message, *reasons])
    assert "ZeroDivisionError: secret detail" in job.error_traceback


def test_a_full_disk_is_tried_once_more_and_then_named(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    full = OSError(errno.ENOSPC, "no space")
    assert run_raising(context, full, at="compute").state == JobState.QUEUED
    job = run_raising(context, full, at="compute")
    assert (job.state, job.error_code) == (JobState.FAILED, "disk_full")


def test_a_cancel_ends_as_cancelled(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    assert run_raising(context, Cancelled("stop"), at="compute").state == JobState.CANCELLED


def test_a_pause_gives_the_job_back(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    job = run_raising(context, Paused("shutting down"), at="compute")
    assert job.state == JobState.QUEUED
    assert job.attempts.get().outcome == AttemptOutcome.RELEASED


def test_inputs_that_cannot_be_fetched_delay_the_job_and_fail_it_after_eight_times(
    make_job: MakeJob, context: WorkerContext
) -> None:
    make_job()
    job = run_raising(context, ConnectionError("S3 is away"), at="compute")
    assert (job.state, job.store_retries) == (JobState.QUEUED, 1)
    assert timedelta(seconds=1) < job.not_before - job.queued_at < timedelta(seconds=300)
    assert "S3 is away" in job.events.last().reason
    Job.objects.filter(pk=job.pk).update(not_before=None, store_retries=MAX_STORE_RETRIES)
    job = run_raising(context, ConnectionError("S3 is away"), at="compute")
    assert (job.state, job.error_code) == (JobState.FAILED, "store_unavailable")


def test_a_damaged_input_fails_at_once(make_job: MakeJob, context: WorkerContext) -> None:
    make_job()
    job = run_raising(context, ArtifactDamaged("other bytes"), at="compute")
    assert (job.state, job.error_code) == (JobState.FAILED, "artifact_damaged")


def test_running_out_of_memory_goes_down_the_ladder_and_fails_at_its_end(
    make_job: MakeJob, context: WorkerContext
) -> None:
    spec = TrainConfig(batch_size=4).dump()
    make_job(kind=JobKind.TRAIN, spec=spec)
    for rung in range(1, 4):
        job = run_raising(context, torch.OutOfMemoryError("CUDA out of memory"), at="compute", kind=JobKind.TRAIN)
        assert (job.state, job.memory_rung) == (JobState.QUEUED, rung)
    job = run_raising(context, torch.OutOfMemoryError("CUDA out of memory"), at="compute", kind=JobKind.TRAIN)
    assert (job.state, job.error_code) == (JobState.FAILED, "oom")
    attempts = list(job.attempts.all())
    assert [attempt.memory_rung for attempt in attempts] == [0, 1, 2, 3]
    assert [attempt.outcome for attempt in attempts] == [AttemptOutcome.OUT_OF_MEMORY] * 3 + [AttemptOutcome.FAILED]
    assert "micro-batches of 2" in attempts[1].reason


def test_a_process_that_ran_out_of_memory_twice_is_replaced(
    make_job: MakeJob, context: WorkerContext, exits: list[int]
) -> None:
    make_job()
    run_raising(context, torch.OutOfMemoryError("CUDA out of memory"), at="compute")
    assert context.may_claim()
    run_raising(context, torch.OutOfMemoryError("CUDA out of memory"), at="compute")
    assert not context.may_claim()
    drain(JobKind.GENERATE, Work)
    assert exits == [EXIT_RECYCLE]
    assert Job.objects.get().state == JobState.QUEUED


def test_a_device_error_costs_the_try_and_the_process(
    make_job: MakeJob, context: WorkerContext, exits: list[int]
) -> None:
    class Broken(Work):
        def compute(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first, second = make_job(), make_job()
    drain(JobKind.GENERATE, Broken)
    attempt = first.attempts.get()
    assert attempt.outcome == AttemptOutcome.DEVICE_ERROR
    assert "illegal memory access" in attempt.reason
    assert second.attempts.count() == 0
    assert exits == [EXIT_RECYCLE]


def test_a_process_that_grew_too_large_finishes_its_uploads_and_is_replaced(
    make_job: MakeJob, context: WorkerContext, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_memory_limit_bytes", 1)
    first, second = make_job(), make_job()
    drain(JobKind.GENERATE, Work)
    states = [Job.objects.get(pk=job.pk).state for job in (first, second)]
    assert states == [JobState.SUCCEEDED, JobState.QUEUED]
    assert exits == [EXIT_RECYCLE]


def test_a_job_that_computed_for_too_long_in_all_its_tries_fails(
    make_job: MakeJob, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    Job.objects.filter(pk=job.pk).update(used_worker_seconds=50)
    monkeypatch.setitem(settings.LORASITE, "GENERATE_TIME_LIMIT_SECONDS", 49.0)
    drain(JobKind.GENERATE, Work)
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "deadline")


def test_a_database_that_is_away_records_nothing_and_the_lease_decides(
    make_job: MakeJob, context: WorkerContext
) -> None:
    make_job()
    job = run_raising(context, OperationalError("server closed the connection"), at="compute")
    assert (job.state, job.token) == (JobState.RUNNING, 1)
    assert context.heartbeat.holds() == []


def test_a_record_that_fails_leaves_nothing_visible(make_job: MakeJob, context: WorkerContext) -> None:
    class HalfRecorded(Work):
        def record(self) -> None:
            Job.objects.filter(pk=self.hold.job.pk).update(priority=7)
            raise RuntimeError("in the middle")

    make_job()
    hold = take(context)
    run([hold], HalfRecorded)
    context.uploader.turn()
    job = Job.objects.get(pk=hold.job.pk)
    assert (job.state, job.priority) == (JobState.QUEUED, 0)


def test_work_whose_lease_was_taken_records_nothing(make_job: MakeJob, context: WorkerContext) -> None:
    recorded: list[bool] = []

    class Overtaken(Work):
        def compute(self) -> None:
            expire_lease(self.hold.job)
            assert claim_one(kinds=[JobKind.GENERATE], worker=context.worker) is not None

        def record(self) -> None:
            recorded.append(True)

    make_job()
    hold = take(context)
    run([hold], Overtaken)
    context.uploader.turn()
    job = Job.objects.get(pk=hold.job.pk)
    assert recorded == []
    assert (job.state, job.token) == (JobState.RUNNING, 2)


def test_a_drain_works_until_nothing_is_left(make_job: MakeJob, context: WorkerContext) -> None:
    jobs = [make_job() for _ in range(3)]
    drain(JobKind.GENERATE, Work)
    assert context.uploader.pending_count() == 3
    context.uploader.turn()
    assert {Job.objects.get(pk=job.pk).state for job in jobs} == {JobState.SUCCEEDED}


def test_a_drain_stops_claiming_once_the_worker_goes_down(make_job: MakeJob, context: WorkerContext) -> None:
    class LastOne(Work):
        def files(self) -> list[Path]:
            context.shutdown.raise_flag()
            return []

    jobs = [make_job() for _ in range(3)]
    drain(JobKind.GENERATE, LastOne)
    context.uploader.turn()
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


def test_a_training_makes_room_for_interactive_work_and_the_drain_ends(
    make_job: MakeJob, context: WorkerContext
) -> None:
    class Asked(Work):
        def compute(self) -> None:
            Job.objects.filter(pk=self.hold.job.pk).update(yield_requested_at=self.hold.job.created_at)
            context.heartbeat.beat()
            super().compute()

    jobs = [make_job(kind=JobKind.TRAIN) for _ in range(2)]
    drain(JobKind.TRAIN, Asked)
    first, second = (Job.objects.get(pk=job.pk) for job in jobs)
    assert (first.state, first.attempts_count, first.barren_losses) == (JobState.QUEUED, 0, 0)
    assert first.attempts.get().outcome == AttemptOutcome.PREEMPTED
    assert second.attempts.count() == 0


def test_interactive_work_is_never_asked_to_make_room(make_job: MakeJob, context: WorkerContext) -> None:
    class Asked(Work):
        def compute(self) -> None:
            self.hold.yielding = True
            super().compute()

    job = make_job()
    drain(JobKind.GENERATE, Asked)
    context.uploader.turn()
    assert Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED


class Party:
    """Computes works together; what it was given, and what it says about each."""

    def __init__(self, *errors: Exception | None, raises: Exception | None = None) -> None:
        self.errors, self.raises, self.sizes = list(errors), raises, list[int]()

    def __call__(self, works: Sequence[Work], join: Any, on_done: Any) -> None:
        self.sizes.append(len(works))
        if self.raises is not None:
            raise self.raises
        for work, error in zip(works, self.errors, strict=True):
            on_done(work, error)


def states_of(context: WorkerContext, holds: Sequence[Hold]) -> list[str]:
    context.uploader.turn()
    return [Job.objects.get(pk=hold.job.pk).state for hold in holds]


def test_one_of_a_batch_may_stop_and_the_others_succeed(make_job: MakeJob, context: WorkerContext) -> None:
    for _ in range(3):
        make_job()
    holds = [take(context) for _ in range(3)]
    party = Party(None, Cancelled("stop"), None)
    run(holds, Work, party)
    assert states_of(context, holds) == [JobState.SUCCEEDED, JobState.CANCELLED, JobState.SUCCEEDED]
    assert party.sizes == [3]


@pytest.mark.parametrize("error", [TrainingDiverged("bad request"), Cancelled("stop"), KeyError("bug")])
def test_a_batch_that_fails_is_computed_one_by_one_so_that_nobody_suffers_from_another(
    make_job: MakeJob, context: WorkerContext, error: Exception
) -> None:
    class OneBad(Work):
        def compute(self) -> None:
            if self.hold is holds[1]:
                raise TrainingDiverged("bad request")

    for _ in range(3):
        make_job()
    holds = [take(context) for _ in range(3)]
    run(holds, OneBad, Party(raises=error))
    assert states_of(context, holds) == [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED]


def test_a_batch_that_runs_out_of_memory_goes_down_the_ladder_together(
    make_job: MakeJob, context: WorkerContext
) -> None:
    for _ in range(2):
        make_job()
    holds = [take(context) for _ in range(2)]
    run(holds, Work, Party(raises=torch.OutOfMemoryError("CUDA out of memory")))
    assert states_of(context, holds) == [JobState.QUEUED, JobState.QUEUED]
    assert list(Job.objects.values_list("memory_rung", flat=True)) == [1, 1]


class JoinedRun:
    """Computes what it was given, then whoever joins, until nobody has joined for three looks."""

    def __init__(self, *, before_look: Callable[[int], None]) -> None:
        self.before_look, self.order, self.states = before_look, list[Job](), list[list[str]]()

    def __call__(self, works: Sequence[Work], join: Any, on_done: Any) -> None:
        looks = 0
        while looks < 3:
            for work in works:
                work.compute()
                on_done(work, None)
                self.order.append(work.hold.job)
                self.states.append(list(Job.objects.order_by("created_at").values_list("state", flat=True)))
            self.before_look(looks)
            works = join(8)
            looks += 1


def test_jobs_that_join_a_run_are_handed_over_as_they_are_done(
    make_job: MakeJob, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.drain.JOIN_SECONDS", 0.0)
    jobs = [make_job(batch_key="k")]

    def arrive(look: int) -> None:
        if look == 1:
            jobs.append(make_job(batch_key="k"))

    together = JoinedRun(before_look=arrive)
    drain(JobKind.GENERATE, Work, together)
    assert together.order == jobs
    assert together.states == [[JobState.UPLOADING], [JobState.UPLOADING] * 2]
    context.uploader.turn()
    assert set(Job.objects.values_list("state", flat=True)) == {JobState.SUCCEEDED}
    assert context.heartbeat.holds() == []


def test_nobody_joins_a_run_of_a_worker_that_must_go_or_of_a_job_that_was_lost_before(
    make_job: MakeJob, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.drain.JOIN_SECONDS", 0.0)
    lost = make_job(batch_key="k")
    Job.objects.filter(pk=lost.pk).update(attempts_count=1)

    def arrive(look: int) -> None:
        if look == 0:
            make_job(batch_key="k")

    together = JoinedRun(before_look=arrive)
    first = jobs_claim(kind=JobKind.GENERATE, worker=context.worker)[0]
    join = Joining(JobKind.GENERATE, context, first, is_over=lambda: False)
    run([context.heartbeat.take(first)], Work, together, join=join)
    assert together.order == [lost]

    claim = jobs_claim(kind=JobKind.GENERATE, worker=context.worker)[0]
    make_job(batch_key="k")
    going = Joining(JobKind.GENERATE, context, claim, is_over=lambda: True)
    assert going(8) == []
    staying = Joining(JobKind.GENERATE, context, claim, is_over=lambda: False)
    assert staying(0) == []
    assert len(staying(8)) == 1


def test_a_worker_row_is_signed_off_when_the_process_goes(context: WorkerContext) -> None:
    context.go()
    context.go()
    assert WorkerProcess.objects.get().state == "gone"
