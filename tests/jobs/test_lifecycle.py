"""The job's life: every end, every fence, every race that the database must decide."""

import threading
from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from jobs import leases, lifecycle, recovery
from jobs.errors import Conflict, LeaseLost
from jobs.models import Job, JobAttempt, OwnerUsage, User, WorkerProcess
from jobs.status import TERMINAL, TRANSITIONS, AttemptOutcome, JobKind, JobState
from jobs.taking import Claim
from jobs.workers import worker_register
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob, expire_lease

KINDS = [JobKind.GENERATE]


def claim(worker: WorkerProcess) -> Claim:
    taken = claim_one(kinds=KINDS, worker=worker)
    assert taken is not None
    return taken


def succeed(taken: Claim) -> None:
    lifecycle.job_uploading(job_id=taken.job.pk, token=taken.token)
    with transaction.atomic():
        lifecycle.job_succeed(job_id=taken.job.pk, token=taken.token)


def history(job: Job) -> list[str]:
    return [event.new_state for event in job.events.all()]


def test_a_job_runs_from_queued_to_succeeded_and_every_step_is_an_event(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = make_job()
    taken = claim(worker)
    assert taken.job.pk == job.pk
    taken.job.refresh_from_db()
    assert taken.job.lease_until is not None
    succeed(taken)
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert job.lease_until is None
    assert job.finished_at is not None
    assert history(job) == ["queued", "running", "uploading", "succeeded"]
    attempt = job.attempts.get()
    assert attempt.outcome == AttemptOutcome.SUCCEEDED
    assert job.used_worker_seconds == pytest.approx((attempt.ended_at - attempt.started_at).total_seconds(), abs=1e-3)


def test_a_failure_keeps_code_sentence_and_traceback(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    taken = claim(worker)
    lifecycle.job_fail(
        job_id=job.pk, token=taken.token, code="nan", message="The loss is not a number.", traceback="tb"
    )
    job.refresh_from_db()
    assert (job.state, job.error_code, job.error_message, job.error_traceback) == (
        JobState.FAILED,
        "nan",
        "The loss is not a number.",
        "tb",
    )
    assert job.attempts.get().outcome == AttemptOutcome.FAILED


def test_final_states_never_change(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    taken = claim(worker)
    succeed(taken)
    for late in (
        lambda: lifecycle.job_fail(job_id=job.pk, token=taken.token, code="x", message="y"),
        lambda: lifecycle.job_cancelled(job_id=job.pk, token=taken.token),
        lambda: lifecycle.job_release(job_id=job.pk, token=taken.token, reason="late"),
        lambda: lifecycle.job_uploading(job_id=job.pk, token=taken.token),
    ):
        with pytest.raises(LeaseLost):
            late()
    with pytest.raises(Conflict, match="already ended"):
        lifecycle.job_cancel(job=job)
    assert history(job) == ["queued", "running", "uploading", "succeeded"]


def test_the_transition_table_has_no_way_out_of_a_final_state() -> None:
    assert all(not TRANSITIONS[state] for state in TERMINAL)
    assert set(TRANSITIONS) == set(JobState)


def test_nothing_to_claim_is_none(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job(kind=JobKind.TRAIN)
    assert claim_one(kinds=KINDS, worker=worker) is None


def test_a_second_claim_of_the_same_job_finds_nothing(make_job: MakeJob, worker: WorkerProcess) -> None:
    make_job()
    claim(worker)
    assert claim_one(kinds=KINDS, worker=worker) is None


def test_a_delayed_job_is_not_claimed_early(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    taken = claim(worker)
    lifecycle.job_release(job_id=job.pk, token=taken.token, reason="store is away", delay_seconds=60)
    assert claim_one(kinds=KINDS, worker=worker) is None
    Job.objects.filter(pk=job.pk).update(not_before=timezone.now() - timedelta(seconds=1))
    assert claim(worker).token == taken.token + 1


def test_a_queued_job_is_cancelled_at_once_without_any_worker(make_job: MakeJob) -> None:
    job = make_job()
    assert lifecycle.job_cancel(job=job) == JobState.CANCELLED
    assert history(job) == ["queued", "cancelled"]
    assert not job.attempts.exists()


def test_a_running_job_learns_of_the_cancel_by_its_heartbeat(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    taken = claim(worker)
    assert lifecycle.job_cancel(job=job) == JobState.RUNNING
    fenced, cancelled, _ = leases.leases_renew({job.pk: taken.token})
    assert (fenced, cancelled) == (set(), {job.pk})
    lifecycle.job_cancelled(job_id=job.pk, token=taken.token)
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED


def test_a_cancelled_job_of_a_dead_worker_ends_when_its_lease_runs_out(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = make_job()
    claim(worker)
    lifecycle.job_cancel(job=job)
    expire_lease(job)
    assert recovery.expired_leases_requeue() == 1
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert job.attempts.get().outcome == AttemptOutcome.LOST


def test_an_expired_lease_goes_to_the_next_claim_and_the_old_worker_is_fenced(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = make_job()
    zombie = claim(worker)
    expire_lease(job)
    other = worker_register(queues=["gpu"], device="cpu")
    successor = claim(other)
    assert successor.token == zombie.token + 1
    fenced, *_ = leases.leases_renew({job.pk: zombie.token})
    assert fenced == {job.pk}
    for write in (
        lambda: lifecycle.job_uploading(job_id=job.pk, token=zombie.token),
        lambda: leases.checkpoint_record(job_id=job.pk, token=zombie.token, step=9, files={}),
        lambda: lifecycle.job_fail(job_id=job.pk, token=zombie.token, code="x", message="y"),
    ):
        with pytest.raises(LeaseLost):
            write()
    succeed(successor)
    assert [a.outcome for a in job.attempts.all()] == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]


def test_a_zombies_progress_is_not_written_over_its_successors(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    zombie = claim(worker)
    expire_lease(job)
    successor = claim(worker)
    leases.leases_renew({job.pk: successor.token}, {job.pk: {"progress_step": 7}})
    leases.leases_renew({job.pk: zombie.token}, {job.pk: {"progress_step": 3}})
    job.refresh_from_db()
    assert job.progress_step == 7


def test_a_renewed_lease_is_not_taken(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    taken = claim(worker)
    expire_lease(job)
    leases.leases_renew({job.pk: taken.token})
    assert recovery.expired_leases_requeue() == 0
    job.refresh_from_db()
    assert job.state == JobState.RUNNING


def test_a_lease_renewed_after_it_was_read_as_expired_is_not_taken(make_job: MakeJob, worker: WorkerProcess) -> None:
    """The sweep reads, the heartbeat renews, the sweep writes."""
    job = make_job()
    taken = claim(worker)
    expire_lease(job)
    read = Job.objects.lease_expired().get()
    leases.leases_renew({job.pk: taken.token})
    assert lifecycle.job_lost(job=read, reason="not heard") is None
    job.refresh_from_db()
    assert (job.state, job.token) == (JobState.RUNNING, taken.token)


def test_three_losses_without_progress_are_poison(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    for _ in range(3):
        claim(worker)
        expire_lease(job)
        recovery.expired_leases_requeue()
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "poison")
    assert [a.outcome for a in job.attempts.all()] == [AttemptOutcome.LOST] * 3
    assert claim_one(kinds=KINDS, worker=worker) is None


def test_a_worker_that_dies_while_it_stores_results_says_nothing_against_the_job(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = make_job()
    for _ in range(4):
        taken = claim(worker)
        lifecycle.job_uploading(job_id=job.pk, token=taken.token)
        expire_lease(job)
        recovery.expired_leases_requeue()
    job.refresh_from_db()
    assert (job.state, job.barren_losses) == (JobState.QUEUED, 0)


def test_checkpoint_progress_makes_losses_harmless(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job(kind=JobKind.TRAIN)
    for step in range(1, 7):
        taken = claim_one(kinds=[JobKind.TRAIN], worker=worker)
        assert taken is not None
        leases.checkpoint_record(job_id=job.pk, token=taken.token, step=step, files={"a": "b"})
        expire_lease(job)
        recovery.expired_leases_requeue()
    job.refresh_from_db()
    assert job.state == JobState.QUEUED
    assert job.checkpoint_step == 6
    assert [(a.from_step, a.to_step) for a in job.attempts.all()] == [(n, n + 1) for n in range(6)]


def test_a_released_job_waits_again_and_counts_as_no_loss(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    for _ in range(5):
        taken = claim(worker)
        lifecycle.job_release(job_id=job.pk, token=taken.token, reason="shutdown")
    job.refresh_from_db()
    assert (job.state, job.barren_losses) == (JobState.QUEUED, 0)


def test_a_job_past_its_deadline_expires(make_job: MakeJob) -> None:
    late, early = make_job(), make_job()
    Job.objects.filter(pk=late.pk).update(deadline=timezone.now() - timedelta(seconds=1))
    Job.objects.filter(pk=early.pk).update(deadline=timezone.now() + timedelta(hours=1))
    assert recovery.queued_past_deadline_expire() == 1
    assert Job.objects.get(pk=late.pk).state == JobState.EXPIRED
    assert Job.objects.get(pk=early.pk).state == JobState.QUEUED


def test_lost_work_is_claimed_before_new_work(make_job: MakeJob, worker: WorkerProcess) -> None:
    lost = make_job()
    claim(worker)
    make_job()
    expire_lease(lost)
    assert claim(worker).job.pk == lost.pk


def test_the_person_who_was_served_least_goes_first(make_job: MakeJob, worker: WorkerProcess) -> None:
    busy_person_job = make_job()
    taken = claim(worker)
    succeed(taken)
    OwnerUsage.objects.filter(owner=busy_person_job.owner).update(worker_seconds=500)
    make_job()
    quiet = User.objects.create_user("quiet")
    quiet_job = make_job(owner=quiet)
    assert claim(worker).job.pk == quiet_job.pk


def test_the_database_refuses_a_lease_on_a_job_that_nobody_holds(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(lease_until=timezone.now())


def test_the_database_refuses_a_final_state_without_an_end_and_a_failure_without_a_code(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(state=JobState.SUCCEEDED)
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(state=JobState.FAILED, finished_at=timezone.now())


def test_the_database_refuses_two_open_attempts(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    claim(worker)
    with pytest.raises(IntegrityError), transaction.atomic():
        JobAttempt.objects.create(job=job, token=99, worker=worker, worker_name="x", started_at=timezone.now())


@pytest.mark.django_db(transaction=True)
def test_many_workers_at_once_claim_each_job_exactly_once() -> None:
    people = [User.objects.create_user(f"crowd-{number}") for number in range(3)]
    from jobs.submission import job_submit

    for number in range(12):
        job_submit(owner=people[number % 3], kind=JobKind.GENERATE, spec={}, attach=lambda job: None)
    workers = [worker_register(queues=["gpu"], device="cpu") for _ in range(4)]
    taken: list[Claim] = []
    errors: list[BaseException] = []
    start = threading.Barrier(len(workers))

    def work(worker: WorkerProcess) -> None:
        try:
            start.wait()
            while (got := claim_one(kinds=KINDS, worker=worker)) is not None:
                taken.append(got)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(taken) == 12
    assert len({claimed.job.pk for claimed in taken}) == 12
    assert {claimed.token for claimed in taken} == {1}


def test_a_generation_is_taken_from_a_silent_worker_sooner_than_a_training(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    spans = {}
    for kind in (JobKind.GENERATE, JobKind.TRAIN):
        make_job(kind=kind)
        taken = claim_one(kinds=[kind], worker=worker)
        assert taken is not None
        leases.leases_renew({taken.job.pk: taken.token})
        spans[kind] = (Job.objects.get(pk=taken.job.pk).lease_until - timezone.now()).total_seconds()
    assert spans[JobKind.GENERATE] == pytest.approx(12, abs=1.5)
    assert spans[JobKind.TRAIN] == pytest.approx(30, abs=1.5)
