"""Claims against a real database: whose turn it is, limits, batches, and trainings that let people go first."""

import os
import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django.fixtures import Settings

from jobs import claims, lifecycle, recovery
from jobs.models import Job, OwnerUsage, User, WorkerProcess
from jobs.scheduling import TRAINING_PATIENCE_SECONDS
from jobs.status import JobKind, JobState
from jobs.submission import job_submit
from jobs.workers import worker_ready, worker_register
from tests.factories import claim_one, make_base_model, take
from tests.jobs.conftest import MakeJob, expire_lease
from tests.services import postgres

GENERATE, TRAIN = JobKind.GENERATE, JobKind.TRAIN


def claim(worker: WorkerProcess, kind: JobKind = GENERATE) -> Job | None:
    taken = claim_one(kinds=[kind], worker=worker)
    return taken and taken.job


def batch(worker: WorkerProcess, at_most: int = 8) -> list[Job]:
    return [claimed.job for claimed in claims.jobs_claim(kind=GENERATE, worker=worker, at_most=at_most)]


def set_columns(job: Job, **values: Any) -> None:
    Job.objects.filter(pk=job.pk).update(**values)


def limits(settings: Settings, *, generations: int = 4, trainings: int = 1) -> None:
    settings.LORASITE = {
        **settings.LORASITE,
        "MAX_RUNNING_GENERATIONS_PER_PERSON": generations,
        "MAX_RUNNING_TRAININGS_PER_PERSON": trainings,
    }


def used(person: User, worker_seconds: float) -> None:
    OwnerUsage.objects.update_or_create(
        owner=person, defaults={"worker_seconds": worker_seconds, "as_of": timezone.now()}
    )


def test_a_quiet_person_is_next_though_another_put_a_thousand_jobs_before(
    make_job: MakeJob, person: User, worker: WorkerProcess
) -> None:
    sample = make_job()
    fields = {f.attname: getattr(sample, f.attname) for f in Job._meta.concrete_fields if f.attname != "id"}
    Job.objects.bulk_create(Job(**fields) for _ in range(1000))
    quiet = make_job(owner=User.objects.create_user("quiet"))
    used(person, 100)
    assert claim(worker) == quiet


def test_twice_the_weight_halves_what_was_used(make_job: MakeJob, person: User, worker: WorkerProcess) -> None:
    other = User.objects.create_user("other")
    make_job(owner=other)
    heavier = make_job()
    User.objects.filter(pk=person.pk).update(scheduling_weight=2)
    used(person, 150)
    used(other, 100)
    assert claim(worker) == heavier


def test_what_runs_now_counts_before_it_has_ended(make_job: MakeJob, person: User, worker: WorkerProcess) -> None:
    make_job()
    make_job()
    other = make_job(owner=User.objects.create_user("other"))
    first = claim(worker)
    assert first is not None
    first.attempts.update(started_at=timezone.now() - timedelta(seconds=100))
    assert claim(worker) == other


def test_a_warm_base_is_found_behind_many_cold_ones(
    make_job: MakeJob, worker: WorkerProcess, settings: Settings
) -> None:
    warm, cold = make_base_model(), make_base_model()
    older = [make_job(base_model=cold) for _ in range(12)]
    newest = make_job(base_model=warm)
    worker_ready(worker=worker, warm_bases=[warm.fingerprint])
    assert claim(worker) == newest
    last = make_job(base_model=warm)
    Job.objects.filter(pk__in=[job.pk for job in older]).update(queued_at=timezone.now() - timedelta(minutes=1))
    assert claim(worker) in older
    assert Job.objects.get(pk=last.pk).state == JobState.QUEUED


def test_lost_work_goes_first(make_job: MakeJob, worker: WorkerProcess) -> None:
    lost = make_job()
    assert claim(worker) == lost
    make_job(), make_job(owner=User.objects.create_user("other"))
    used(lost.owner, 1000)
    expire_lease(lost)
    assert claim(worker) == lost


def test_an_expired_lease_is_found_by_a_claim_when_nothing_else_waits(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    claim(worker)
    expire_lease(job)
    assert claim(worker) == job


def test_work_that_made_room_does_not_count_as_lost(make_job: MakeJob, worker: WorkerProcess) -> None:
    yielded, priority = make_job(kind=TRAIN), make_job(kind=TRAIN)
    first = take(yielded, worker)
    assert first is not None
    expire_lease(yielded)
    assert recovery.expired_leases_requeue() == 1
    again = take(yielded, worker)
    assert again is not None
    lifecycle.job_preempted(job_id=yielded.pk, token=again.token, reason="others wait")
    set_columns(priority, priority=1)
    assert claim(worker, TRAIN) == priority


def test_a_person_runs_no_more_jobs_at_once_than_the_limit(
    make_job: MakeJob, worker: WorkerProcess, settings: Settings
) -> None:
    limits(settings, generations=2)
    jobs = [make_job() for _ in range(3)]
    assert [claim(worker), claim(worker), claim(worker)] == [jobs[0], jobs[1], None]
    other = make_job(owner=User.objects.create_user("other"))
    assert [claim(worker), claim(worker)] == [other, None]


def test_a_job_that_stores_its_results_holds_no_place(
    make_job: MakeJob, worker: WorkerProcess, settings: Settings
) -> None:
    limits(settings, generations=1)
    first, second = make_job(), make_job()
    assert claim(worker) == first
    assert claim(worker) is None
    lifecycle.job_uploading(job_id=first.pk, token=1)
    assert claim(worker) == second


def test_kinds_without_a_limit_are_not_limited(make_job: MakeJob, worker: WorkerProcess, settings: Settings) -> None:
    limits(settings, generations=1)
    jobs = [make_job(kind=JobKind.PREPROCESS) for _ in range(3)]
    assert [claim(worker, JobKind.PREPROCESS) for _ in jobs] == jobs


def test_companions_of_other_people_come_with_the_first(make_job: MakeJob, worker: WorkerProcess) -> None:
    people = [User.objects.create_user(f"person-{n}") for n in range(3)]
    jobs = [make_job(owner=owner, batch_key="k", spec={"count": 2}) for owner in people]
    lone = make_job(batch_key="other")
    make_job(owner=people[0])
    assert batch(worker) == jobs
    assert batch(worker, at_most=1) == [lone]


def test_a_batch_holds_eight_pictures_at_most(make_job: MakeJob, worker: WorkerProcess) -> None:
    jobs = [make_job(batch_key="k", spec={"count": 3}) for _ in range(3)]
    assert batch(worker) == jobs[:2]
    assert batch(worker) == jobs[2:]


def test_a_batch_holds_no_more_jobs_of_a_person_than_may_run(
    make_job: MakeJob, worker: WorkerProcess, settings: Settings
) -> None:
    limits(settings, generations=2)
    jobs = [make_job(batch_key="k") for _ in range(4)]
    other = make_job(owner=User.objects.create_user("other"), batch_key="k")
    assert set(batch(worker)) == {*jobs[:2], other}


def test_a_run_is_joined_by_jobs_of_its_key_as_far_as_there_is_room(make_job: MakeJob, worker: WorkerProcess) -> None:
    people = [User.objects.create_user(f"person-{n}") for n in range(3)]
    jobs = [make_job(owner=owner, batch_key="k", spec={"count": 2}) for owner in people]
    joins = partial(claims.jobs_claim, kind=GENERATE, worker=worker, at_most=8, batch_key="k")
    assert joins(pictures=1) == []
    assert [claim.job for claim in joins(pictures=5)] == jobs[:2]
    assert [claim.job for claim in joins(pictures=2)] == jobs[2:]


@pytest.mark.parametrize("change", [{"batch_key": "other"}, {"batch_key": ""}, {"batch_key": "k", "attempts_count": 1}])
def test_nobody_joins_a_run_past_somebody_whose_turn_it_is(
    make_job: MakeJob, worker: WorkerProcess, change: dict[str, object]
) -> None:
    first = make_job()
    Job.objects.filter(pk=first.pk).update(**change)
    later = make_job(owner=User.objects.create_user("other"), batch_key="k")
    joins = partial(claims.jobs_claim, kind=GENERATE, worker=worker, at_most=8, batch_key="k")
    assert joins() == []
    assert batch(worker) == [first]
    assert [claim.job for claim in joins()] == [later]


def test_jobs_without_batch_key_come_alone(make_job: MakeJob, worker: WorkerProcess) -> None:
    first, _ = make_job(), make_job()
    assert batch(worker) == [first]


def test_a_training_leaves_the_only_worker_to_people_who_wait(make_job: MakeJob, worker: WorkerProcess) -> None:
    training, picture = make_job(kind=TRAIN), make_job()
    assert claim(worker, TRAIN) is None
    assert claim(worker) == picture
    assert claim(worker, TRAIN) == training


def test_a_training_starts_when_another_worker_is_free(make_job: MakeJob, worker: WorkerProcess) -> None:
    training, _ = make_job(kind=TRAIN), make_job()
    other = worker_register(queues=["gpu"], device="cpu")
    cpu_only = worker_register(queues=["cpu"], device="cpu")
    worker_ready(worker=cpu_only, warm_bases=[])
    assert claim(worker, TRAIN) is None, "one still starts, the other takes no pictures"
    worker_ready(worker=other, warm_bases=[])
    assert claim(worker, TRAIN) == training


def test_a_busy_worker_is_not_free(make_job: MakeJob, worker: WorkerProcess) -> None:
    other = worker_register(queues=["gpu"], device="cpu")
    worker_ready(worker=other, warm_bases=[])
    make_job()
    assert claim(other) is not None
    make_job(kind=TRAIN), make_job()
    assert claim(worker, TRAIN) is None


def test_a_training_that_waited_long_enough_starts_all_the_same(make_job: MakeJob, worker: WorkerProcess) -> None:
    training, _ = make_job(kind=TRAIN), make_job()
    set_columns(training, queued_at=timezone.now() - timedelta(seconds=TRAINING_PATIENCE_SECONDS + 1))
    assert claim(worker, TRAIN) == training


def test_a_training_that_made_room_waits_for_the_people_it_made_room_for(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    training = make_job(kind=TRAIN)
    set_columns(training, queued_at=timezone.now() - timedelta(hours=1))
    taken = claim_one(kinds=[TRAIN], worker=worker)
    assert taken is not None
    make_job()
    lifecycle.job_preempted(job_id=training.pk, token=taken.token, reason="others wait")
    assert claim(worker, TRAIN) is None
    assert claim(worker) is not None
    assert claim(worker, TRAIN) == training


def test_a_claim_costs_few_queries(make_job: MakeJob, worker: WorkerProcess) -> None:
    """Each is a round trip on the way from a request to its first step."""
    make_job()
    with CaptureQueriesContext(connection) as alone:
        assert claim(worker) is not None
    make_job(), make_job(owner=User.objects.create_user("other"))
    with CaptureQueriesContext(connection) as several:
        assert claim(worker) is not None
    begin_and_commit = 2
    assert len(alone) <= 6 + begin_and_commit
    assert len(several) <= 8 + begin_and_commit


@pytest.mark.django_db(transaction=True)
def test_workers_that_claim_at_once_never_pass_a_persons_limit(settings: Settings) -> None:
    limits(settings, generations=2)
    people = [User.objects.create_user(f"racer-{n}") for n in range(2)]
    for number in range(24):
        job_submit(owner=people[number % 2], kind=GENERATE, spec={}, batch_key="k", attach=lambda job: None)
    workers = [worker_register(queues=["gpu"], device="cpu") for _ in range(6)]
    start, taken, most, errors = threading.Barrier(len(workers)), [], [], []

    def work(worker: WorkerProcess) -> None:
        try:
            start.wait()
            for _ in range(6):
                claimed = claims.jobs_claim(kind=GENERATE, worker=worker, at_most=3)
                taken.extend(claimed)
                most.extend(
                    Job.objects.filter(owner=owner, state=JobState.RUNNING).count() for owner in people
                )  # fmt: skip
                for one in claimed:
                    lifecycle.job_release(job_id=one.job.pk, token=one.token, reason="next")
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
    assert len(taken) >= 8
    assert max(most) == 2
    assert len({(one.job.pk, one.token) for one in taken}) == len(taken)


@pytest.mark.slow
@pytest.mark.skipif("postgresql" in django_settings.DATABASES["default"]["ENGINE"], reason="runs there already")
def test_these_rules_hold_on_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"LORASITE_DATABASE_URL": url},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
