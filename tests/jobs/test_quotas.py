"""Limits on waiting work: exact for one person, told with a sentence and a time to come back."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django.fixtures import Settings

from core.config import GenerateConfig
from core.train_config import TrainConfig
from jobs import quotas
from jobs.errors import InvalidInput, TooBusy
from jobs.models import Job, JobEvent, User
from jobs.status import JobKind, JobState
from jobs.submission import base_preparation_submit, generation_submit, job_submit, training_submit
from tests.factories import bring_to, make_base_model, make_dataset_version
from tests.jobs.test_submission import at_once

Limit = Callable[..., None]


@pytest.fixture(autouse=True)
def _no_remembered_speeds() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


@pytest.fixture
def limit(settings: Settings) -> Limit:
    """Sets limits: `limit(MAX_QUEUED_JOBS=3)`."""

    def set_to(**limits: float) -> None:
        settings.LORASITE = {**settings.LORASITE, **limits}

    return set_to


def submit(owner: User, **values: Any) -> Job:
    values = {"kind": JobKind.GENERATE, "spec": {"prompt": "x"}, "attach": lambda job: None, **values}
    return job_submit(owner=owner, **values)


def refused(owner: User, **values: Any) -> TooBusy:
    """The refusal of one more job, which left nothing behind."""
    before = Job.objects.count(), JobEvent.objects.count()
    with pytest.raises(TooBusy) as caught:
        submit(owner, **values)
    assert (Job.objects.count(), JobEvent.objects.count()) == before
    assert caught.value.http_status == 429
    wait = caught.value.retry_after_seconds
    assert isinstance(wait, int) and 1 <= wait <= 3600
    return caught.value


def ended(job: Job, *, seconds_ago: float) -> None:
    """Write a job's end as of some time ago."""
    bring_to(job, JobState.SUCCEEDED)
    at = timezone.now() - timedelta(seconds=seconds_ago)
    Job.objects.filter(pk=job.pk).update(finished_at=at)
    JobEvent.objects.filter(job=job).update(at=at)


def test_a_person_may_have_so_many_jobs_waiting_and_no_more(owner: User, teammate: User, limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=3)
    jobs = [submit(owner) for _ in range(3)]
    error = refused(owner)
    assert error.code == "too_many_jobs"
    assert "you have 3 jobs waiting and 3 may wait" in str(error)
    submit(teammate)
    bring_to(jobs[0], JobState.RUNNING)
    submit(owner)
    refused(owner)


def test_staff_have_the_same_limits(limit: Limit, db: None) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1)
    root = User.objects.create_superuser("root")
    submit(root)
    refused(root)


def test_everybody_together_may_have_so_many_jobs_waiting(owner: User, teammate: User, limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS=2)
    submit(owner), submit(teammate)
    error = refused(teammate)
    assert error.code == "queue_full"
    assert "2 jobs of all people wait and 2 may wait" in str(error)


def test_estimated_work_of_one_person_is_limited_as_well(owner: User, limit: Limit) -> None:
    limit(MAX_QUEUED_SECONDS_PER_PERSON=100.0)
    submit(owner, units=300.0)
    assert Job.objects.get().estimated_seconds == pytest.approx(60)
    error = refused(owner, units=205.0)
    assert error.code == "too_much_work"
    assert "101 worker seconds and 100 may wait" in str(error)
    submit(owner, units=200.0)


def test_a_job_longer_than_the_limit_is_let_in_when_nothing_else_waits(owner: User, limit: Limit) -> None:
    limit(MAX_QUEUED_SECONDS_PER_PERSON=100.0)
    submit(owner, units=100_000.0)
    refused(owner, units=1.0)


def test_base_models_are_prepared_whatever_waits_and_do_not_count(owner: User, limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1, MAX_QUEUED_JOBS=1)
    base_preparation_submit(owner=owner, base_model=make_base_model(ready=False))
    submit(owner)
    base_preparation_submit(owner=owner, base_model=make_base_model(ready=False))
    refused(owner)


def test_a_repeated_request_is_answered_though_the_queue_is_full(owner: User, limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1, MAX_QUEUED_JOBS=1)
    first = submit(owner, idempotency_key="k")
    assert submit(owner, idempotency_key="k").pk == first.pk
    refused(owner, idempotency_key="other")


def test_without_history_the_wait_is_the_default(owner: User, limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1)
    submit(owner)
    assert refused(owner).retry_after_seconds == quotas.DEFAULT_WAIT_SECONDS


def test_the_wait_follows_from_what_ended_in_the_last_ten_minutes(owner: User, limit: Limit) -> None:
    for number in range(6):
        ended(submit(owner), seconds_ago=50 * number)
    ended(submit(owner), seconds_ago=700)
    limit(MAX_QUEUED_JOBS_PER_PERSON=20)
    for _ in range(20):
        submit(owner)
    # Six in 600 s, and room for a tenth of twenty: 2 jobs x 100 s.
    assert refused(owner).retry_after_seconds == 200


def test_the_wait_for_work_follows_from_the_work_that_ended(owner: User, limit: Limit) -> None:
    ended(submit(owner, units=600.0), seconds_ago=10)  # 120 s of work in 600 s: 0.2 a second
    cache.clear()
    limit(MAX_QUEUED_SECONDS_PER_PERSON=100.0)
    submit(owner, units=500.0)
    assert refused(owner, units=50.0).retry_after_seconds == pytest.approx(10 / 0.2, abs=1)


def test_the_wait_for_a_full_site_follows_from_everybodys_jobs(owner: User, teammate: User, limit: Limit) -> None:
    for number in range(10):
        ended(submit(teammate), seconds_ago=30 * number)
    limit(MAX_QUEUED_JOBS=1)
    submit(teammate)
    assert refused(owner).retry_after_seconds == 60


@pytest.mark.parametrize(("needed", "drained", "seconds"), [(1e9, 1, 3600), (1e-6, 1e9, 1), (0.0, 600, 1)])
def test_the_wait_stays_within_an_hour_and_is_never_zero(needed: float, drained: float, seconds: int) -> None:
    assert quotas._wait(needed, drained, 600.0) == seconds


def test_admission_costs_few_queries_and_none_that_reads_the_history(owner: User) -> None:
    submit(owner)
    with CaptureQueriesContext(
        connection,
    ) as seen:
        submit(owner)
    selects = [query["sql"] for query in seen if query["sql"].startswith("SELECT")]
    assert len(selects) <= 5, selects


@pytest.mark.django_db(transaction=True)
def test_thirty_requests_at_once_do_not_pass_a_persons_limit(limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=12)
    owner = User.objects.create_user("hurried")
    for _ in range(7):
        submit(owner)
    results = at_once(30, lambda: submit(owner))
    assert sum(isinstance(result, Job) for result in results) == 5, results
    assert sum(isinstance(result, TooBusy) for result in results) == 25, results
    assert Job.objects.filter(state=JobState.QUEUED).count() == 12


@pytest.mark.django_db(transaction=True)
def test_twins_at_once_get_one_job_though_it_takes_the_last_place(limit: Limit) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1)
    owner = User.objects.create_user("hurried")
    results = at_once(20, lambda: submit(owner, idempotency_key="k").pk)
    assert set(results) == {Job.objects.get().pk}


def test_one_request_may_ask_for_so_much_only(owner: User) -> None:
    base = make_base_model()
    largest = {"prompt": "x", "width": 512, "height": 512, "steps": 59, "count": 64}
    generation_submit(owner=owner, base_model=base, loras=[], values=largest)
    with pytest.raises(InvalidInput, match="64 pictures of 512x512 px in 60 steps are 1007 million pixel steps"):
        generation_submit(owner=owner, base_model=base, loras=[], values={**largest, "steps": 60})
    version = make_dataset_version(owner)
    config = TrainConfig(steps=200_000, batch_size=64)
    with pytest.raises(InvalidInput, match="12800000 pictures; one training may show 10000000"):
        training_submit(owner=owner, dataset_version=version, base_model=base, lora_name="x", config=config)
    assert not Job.objects.filter(kind=JobKind.TRAIN).exists()


def test_every_default_is_far_below_the_budget() -> None:
    quotas.refuse_oversized_training(TrainConfig())
    quotas.refuse_oversized_generation(GenerateConfig(prompt="x"))
