"""Submitting: one transaction, one job per key, refusals before anything is written."""

import threading
from collections.abc import Callable, Sequence

import pytest
from django.db import connection

from core.config import PreprocessConfig, canonical_json_hash
from core.errors import ConfigError
from core.train_config import TrainConfig
from jobs.errors import Conflict, IdempotencyMismatch, InvalidInput, NotReady
from jobs.models import BaseModel, GenerationRequest, Job, JobEvent, LoraVersion, TrainingRun, User
from jobs.models.job import SPEC_VERSION
from jobs.status import JobKind, JobState
from jobs.submission import (
    base_preparation_submit,
    generation_submit,
    job_submit,
    preprocess_submit,
    training_submit,
)
from jobs.workers import worker_register
from tests.factories import make_base_model, make_dataset, make_dataset_version, make_lora


def submit(owner: User, key: str | None = None, **request: object) -> Job:
    """A job without a request row."""
    return job_submit(
        owner=owner,
        kind=JobKind.GENERATE,
        spec={"prompt": "x"},
        idempotency_key=key,
        request=dict(request) or None,
        attach=lambda job: None,
    )


def test_a_submitted_job_is_queued_with_its_full_configuration_and_one_event(owner: User) -> None:
    base = make_base_model()
    job = generation_submit(owner=owner, base_model=base, loras=[], values={"prompt": "x"})
    assert (job.state, job.kind, job.base_model, job.token) == (JobState.QUEUED, JobKind.GENERATE, base, 0)
    assert (job.spec["steps"], job.spec["width"]) == (25, 64)
    assert job.spec_hash == canonical_json_hash(job.spec)
    event = JobEvent.objects.get(job=job)
    assert (event.old_state, event.new_state, event.reason) == ("", "queued", "submitted")
    assert job.generation_request.base_model == base


def test_a_failing_request_row_takes_the_job_with_it(owner: User) -> None:
    def fail(job: Job) -> None:
        raise RuntimeError("no row")

    with pytest.raises(RuntimeError):
        job_submit(owner=owner, kind=JobKind.TRAIN, spec={}, attach=fail)
    assert (Job.objects.count(), JobEvent.objects.count()) == (0, 0)


def test_the_same_key_returns_the_first_job(owner: User) -> None:
    assert submit(owner, "k", a=1).pk == submit(owner, "k", a=1).pk
    assert JobEvent.objects.count() == 1


def test_the_same_key_for_another_request_is_refused(owner: User) -> None:
    first = submit(owner, "k", a=1)
    with pytest.raises(IdempotencyMismatch, match=str(first.pk)):
        submit(owner, "k", a=2)


def test_keys_of_different_people_do_not_meet(owner: User, teammate: User) -> None:
    assert submit(owner, "k").pk != submit(teammate, "k").pk


def test_without_a_key_every_request_is_a_job(owner: User) -> None:
    assert submit(owner).pk != submit(owner).pk


def at_once(count: int, work: Callable[[], object]) -> list[object]:
    """Run `work` in threads that start together; results or exceptions."""
    start, results = threading.Barrier(count), list[object]()

    def run() -> None:
        start.wait()
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.django_db(transaction=True)
def test_a_hundred_identical_requests_at_once_make_one_job() -> None:
    owner = User.objects.create_user("hurried")
    results = at_once(100, lambda: submit(owner, "k", a=1).pk)
    assert set(results) == {Job.objects.get().pk}
    assert JobEvent.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_preparations_started_at_once_get_different_numbers() -> None:
    owner = User.objects.create_user("hurried")
    dataset = make_dataset(owner)
    results = at_once(4, lambda: preprocess_submit(owner=owner, dataset=dataset, config=PreprocessConfig()))
    assert all(isinstance(result, Job) for result in results), results
    assert sorted(dataset.versions.values_list("number", flat=True)) == [1, 2, 3, 4]


def test_a_training_whose_pictures_do_not_fit_the_base_is_refused_with_the_way_out(owner: User) -> None:
    version = make_dataset_version(owner)
    base = make_base_model()
    base.facts["bucket_step_px"] = 48
    base.save()
    with pytest.raises(InvalidInput, match="Preprocess again with bucket_step_px=48"):
        training_submit(owner=owner, dataset_version=version, base_model=base, lora_name="x", config=TrainConfig())
    assert not TrainingRun.objects.exists()


def test_a_lora_name_stays_with_its_base_model(owner: User) -> None:
    lora, version = make_lora(owner), make_dataset_version(owner)
    with pytest.raises(Conflict, match="choose another name"):
        training_submit(
            owner=owner,
            dataset_version=version,
            base_model=make_base_model(),
            lora_name=lora.name,
            config=TrainConfig(),
        )
    job = training_submit(
        owner=owner,
        dataset_version=version,
        base_model=lora.base_model,
        lora_name=lora.name,
        config=TrainConfig(),
    )
    assert job.training_run.lora_name == lora.name


def test_a_lora_version_named_twice_is_refused_before_anything_is_written(owner: User) -> None:
    version = make_lora(owner).versions.select_related("lora__base_model").get()
    with pytest.raises(InvalidInput, match="named twice"):
        generation_submit(
            owner=owner,
            base_model=version.lora.base_model,
            loras=[(version, 0.5), (version, 0.5)],
            values={"prompt": "x"},
        )
    assert not GenerationRequest.objects.exists()
    assert not Job.objects.filter(kind=JobKind.GENERATE).exists()


def test_a_generations_values_are_checked_by_the_workers_own_class(owner: User) -> None:
    with pytest.raises(ConfigError, match="steps"):
        generation_submit(owner=owner, base_model=make_base_model(), loras=[], values={"prompt": "x", "steps": 0})


def test_an_unprepared_base_is_not_ready_and_is_prepared_once_at_a_time(owner: User) -> None:
    base = make_base_model(ready=False)
    with pytest.raises(NotReady, match="not started"):
        generation_submit(owner=owner, base_model=base, loras=[], values={"prompt": "x"})
    job = base_preparation_submit(owner=owner, base_model=base)
    base.refresh_from_db()
    assert base.job == job
    with pytest.raises(Conflict, match=str(job.pk)):
        base_preparation_submit(owner=owner, base_model=base)


def key(owner: User, base: BaseModel, loras: Sequence[tuple[LoraVersion, float]] = (), **values: object) -> str:
    """The batch key of a generation."""
    return str(generation_submit(owner=owner, base_model=base, loras=loras, values={"prompt": "x", **values}).batch_key)


def test_generations_that_differ_in_all_but_model_and_size_may_share_a_run(owner: User, teammate: User) -> None:
    lora = make_lora(owner, versions=1)
    base, (version,) = lora.base_model, lora.versions.select_related("lora__base_model")
    first = key(owner, base)
    assert len(first) == 64
    assert key(teammate, base, prompt="y", negative_prompt="z", seed=7, count=8) == first
    assert key(owner, base, steps=24, guidance=6.5, sampler="euler", clip_skip=2) == first
    assert key(owner, base, [(version, 0.5)]) == first


def test_model_and_size_are_part_of_the_key(owner: User) -> None:
    base = make_base_model()
    keys = [
        key(owner, base),
        key(owner, make_base_model()),
        key(owner, base, width=80),
        key(owner, base, height=80),
    ]
    assert "" not in keys
    assert len(set(keys)) == len(keys)


def test_a_request_that_fills_a_forward_of_its_own_or_is_exact_runs_alone(owner: User) -> None:
    base = make_base_model()
    assert key(owner, base, count=9) == ""
    assert key(owner, base, exact=True) == ""


def test_jobs_say_which_version_of_the_specification_they_hold(owner: User) -> None:
    job = submit(owner)
    job.refresh_from_db()
    assert job.spec_version == 1 < SPEC_VERSION
    assert worker_register(queues=["gpu"], device="cpu").spec_version == SPEC_VERSION
