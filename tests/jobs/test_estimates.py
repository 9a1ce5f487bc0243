"""Estimates grow with the work, and learn from what such jobs took here."""

from collections.abc import Iterator

import pytest
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext

from core.config import GenerateConfig, HiresConfig
from core.train_config import TrainConfig
from jobs.estimates import (
    LATELY_JOBS,
    SECONDS_PER_UNIT,
    estimated_seconds,
    generation_units,
    pixel_steps,
    preprocess_units,
    training_units,
)
from jobs.models import BaseModel, Job, User
from jobs.status import JobKind, JobState
from jobs.submission import generation_submit
from tests.factories import bring_to, make_base_model, make_dataset_version


@pytest.fixture(autouse=True)
def _no_remembered_speeds() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


def ran(owner: User, base: BaseModel, *, seconds: float, **values: object) -> Job:
    """A generation of 64x64x10 steps with guidance (0.08192 units) that took so long."""
    values = {"prompt": "x", "steps": 10, **values}
    job = bring_to(generation_submit(owner=owner, base_model=base, loras=[], values=values), JobState.SUCCEEDED)
    Job.objects.filter(pk=job.pk).update(used_worker_seconds=seconds)
    return job


@pytest.mark.parametrize(
    ("field", "factor"), [({"steps": 50}, 2), ({"count": 3}, 3), ({"width": 1024}, 2), ({"guidance": 1.0}, 0.5)]
)
def test_a_generation_is_pixels_times_steps_times_pictures(field: dict[str, float], factor: float) -> None:
    plain = GenerateConfig(prompt="x")
    assert generation_units(plain) == pytest.approx(512 * 512 * 25 * 2 / 1e6)
    assert generation_units(plain.model_copy(update=field)) == pytest.approx(factor * generation_units(plain))


@pytest.mark.parametrize(
    ("field", "factor"), [({"steps": 2000}, 2), ({"batch_size": 8}, 2), ({"gradient_accumulation_steps": 4}, 4)]
)
def test_a_training_is_steps_times_pictures_of_a_step(field: dict[str, int], factor: float) -> None:
    assert training_units(TrainConfig()) == 4000
    assert training_units(TrainConfig(**field)) == factor * 4000


def test_a_training_that_computes_twice_takes_a_third_longer() -> None:
    assert training_units(TrainConfig(gradient_checkpointing=True)) == pytest.approx(4000 * 4 / 3)


def test_without_history_the_constants_count(db: None) -> None:
    assert estimated_seconds(JobKind.PREPROCESS, preprocess_units(20)) == pytest.approx(4.0)
    assert estimated_seconds(JobKind.PREPARE_BASE, 1.0) == 60.0


def test_the_median_of_the_same_base_counts_once_there_are_three(owner: User) -> None:
    base, other = make_base_model(), make_base_model()
    for seconds in (8.192, 16.384):
        ran(owner, base, seconds=seconds)
    ran(owner, other, seconds=9999)
    assert estimated_seconds(JobKind.GENERATE, 1.0, base.pk) == SECONDS_PER_UNIT[JobKind.GENERATE]
    cache.clear()
    ran(owner, base, seconds=900)
    cache.clear()
    assert estimated_seconds(JobKind.GENERATE, 1.0, base.pk) == pytest.approx(200.0)
    assert estimated_seconds(JobKind.GENERATE, 1.0, other.pk) == SECONDS_PER_UNIT[JobKind.GENERATE]


def test_a_size_of_its_own_does_not_mislead_the_median(owner: User) -> None:
    base = make_base_model()
    for count in (1, 2, 4):
        ran(owner, base, seconds=0.8192 * count, count=count)
    cache.clear()
    assert estimated_seconds(JobKind.GENERATE, 1.0, base.pk) == pytest.approx(10.0)


def test_preparations_learn_from_their_pictures(owner: User) -> None:
    for _ in range(3):
        version = make_dataset_version(owner)  # two pictures
        Job.objects.filter(pk=version.job_id).update(used_worker_seconds=3.0)
    cache.clear()
    assert estimated_seconds(JobKind.PREPROCESS, preprocess_units(10)) == pytest.approx(15.0)


def test_specifications_of_a_newer_version_are_left_out(owner: User) -> None:
    base = make_base_model()
    for _ in range(3):
        job = ran(owner, base, seconds=500)
        Job.objects.filter(pk=job.pk).update(spec={**job.spec, "a_field_of_tomorrow": 1})
    cache.clear()
    assert estimated_seconds(JobKind.GENERATE, 1.0, base.pk) == SECONDS_PER_UNIT[JobKind.GENERATE]


def test_many_requests_pay_for_one_bounded_query(owner: User) -> None:
    base = make_base_model()
    with CaptureQueriesContext(connection) as seen:
        for _ in range(20):
            estimated_seconds(JobKind.GENERATE, 1.0, base.pk)
    (query,) = seen
    assert f"LIMIT {LATELY_JOBS}" in query["sql"]


def test_the_estimate_is_written_to_the_job(owner: User) -> None:
    values = {"prompt": "x", "steps": 10, "count": 5}
    job = generation_submit(owner=owner, base_model=make_base_model(), loras=[], values=values)
    job.refresh_from_db()
    assert job.estimated_seconds == pytest.approx(64 * 64 * 10 * 5 * 2 / 1e6 * SECONDS_PER_UNIT[JobKind.GENERATE])


def test_a_second_pass_counts_by_its_pixels_and_steps_and_a_beginning_picture_saves_some() -> None:
    plain = GenerateConfig(prompt="x", width=512, height=512, steps=20)
    hires = plain.model_copy(update={"hires": HiresConfig(scale=2, steps=10, denoising_strength=0.5)})
    begun = plain.model_copy(update={"init_image": "0" * 64, "denoising_strength": 0.25})

    assert pixel_steps(plain) == 512 * 512 * 20
    assert pixel_steps(hires) == 512 * 512 * (20 + 5 * 4)
    assert pixel_steps(begun) == 512 * 512 * 5
