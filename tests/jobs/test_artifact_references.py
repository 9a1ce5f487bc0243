"""No column that names blobs is forgotten, and each keeps the blobs that it names."""

import pytest
from django.apps import apps
from django.db.models import Field, JSONField

from jobs.artifact_references import NO_REFERENCES, REFERENCES, hashes_in, referenced
from jobs.models import BaseModel, DatasetImage, DatasetVersion, GeneratedImage, Job, LoraVersion, TrainingRun, User
from jobs.models.record import Sha256Field
from jobs.status import JobState
from tests.factories import (
    make_base_model,
    make_dataset,
    make_dataset_version,
    make_generation,
    make_input_image,
    make_job,
    make_lora,
    make_training,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64


def columns_that_may_hold_hashes() -> set[str]:
    found = set()
    for model in apps.get_app_config("jobs").get_models():
        for field in model._meta.get_fields():
            if isinstance(field, Field) and isinstance(field, Sha256Field | JSONField):
                found.add(f"{model.__name__}.{field.name}")
    return found


def test_every_hash_and_json_column_is_a_reference_or_named_as_none() -> None:
    references = {f"{reference.model.__name__}.{reference.column}" for reference in REFERENCES}
    assert references & NO_REFERENCES == set()
    assert columns_that_may_hold_hashes() - references - NO_REFERENCES == set(), (
        "add the new column to REFERENCES in jobs/artifact_references.py, or to NO_REFERENCES with the reason"
    )
    assert (references | NO_REFERENCES) - columns_that_may_hold_hashes() == set(), "a column that is gone"


def test_json_columns_are_read_as_json_and_plain_ones_as_plain() -> None:
    for reference in REFERENCES:
        field = reference.model._meta.get_field(reference.column)
        assert isinstance(field, JSONField) == reference.is_json


@pytest.mark.parametrize(
    ("value", "hashes"),
    [
        ({"x": A, "deep": [{"y": [B]}, 3, None]}, {A, B}),
        ([{"step": 0, "sha256": A}], {A}),
        ({A: "a key is no value"}, set()),
        ({"source_sha256": A, "sha256": B}, {B}),
        ({"x": A + "\n", "y": A.upper(), "z": A[:-1]}, set()),
        (A, {A}),
        (None, set()),
    ],
)
def test_hashes_are_found_at_any_depth(value: object, hashes: set[str]) -> None:
    assert set(hashes_in(value)) == hashes


def test_a_blob_that_nothing_names_is_not_referenced(db: None) -> None:
    assert referenced([A, B]) == set()


def test_uploaded_and_prepared_pictures_are_kept_each_by_its_own_row(owner: User) -> None:
    version = make_dataset_version(owner, dataset=make_dataset(owner, pictures=2))
    originals = set(DatasetImage.objects.values_list("sha256", flat=True))
    prepared = {image["sha256"] for image in (version.manifest or {})["images"]}
    assert referenced({*originals, *prepared, C}) == originals | prepared
    DatasetImage.objects.all().delete()
    assert referenced(originals | prepared) == prepared
    DatasetVersion.objects.all().delete()
    assert referenced(originals | prepared) == set()


def test_files_of_a_base_are_kept(db: None) -> None:
    base = make_base_model()
    assert referenced([*base.files.values(), C]) == set(base.files.values())
    BaseModel.objects.all().delete()
    assert referenced(base.files.values()) == set()


def test_the_files_of_a_lora_and_its_sample_pictures_are_kept(owner: User) -> None:
    version = make_lora(owner).versions.get()
    files = {version.kohya_sha256, *version.peft_files.values()}
    samples = [{"step": 0, "prompt": "a cat", "sha256": A}]
    if version.training_run_id is None:
        LoraVersion.objects.filter(pk=version.pk).update(training_run=make_training(owner))
    TrainingRun.objects.update(samples=samples)
    assert referenced({*files, A, B}) == files | {A}
    assert version.model_hash not in referenced([version.model_hash]) - files


def test_generated_pictures_are_kept(owner: User) -> None:
    make_generation(owner)
    pictures = set(GeneratedImage.objects.values_list("sha256", flat=True))
    assert pictures
    assert referenced(pictures | {C}) == pictures
    GeneratedImage.objects.all().delete()
    assert referenced(pictures) == set()


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING])
def test_the_newest_checkpoint_and_the_loras_of_an_unfinished_job_are_kept(owner: User, state: JobState) -> None:
    job = make_job(owner, state)
    Job.objects.filter(pk=job.pk).update(checkpoint={"lora.safetensors": A}, spec={"loras": [{"sha256": B}]})
    assert referenced([A, B, C]) == {A, B}
    Job.objects.filter(pk=job.pk).update(checkpoint={"lora.safetensors": C})
    assert referenced([A, B, C]) == {B, C}


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
def test_an_ended_job_keeps_no_checkpoint(owner: User, state: JobState) -> None:
    job = make_job(owner, state)
    Job.objects.filter(pk=job.pk).update(checkpoint={"lora.safetensors": A})
    assert referenced([A]) == set()


def test_more_hashes_than_one_query_takes(owner: User) -> None:
    dataset = make_dataset(owner, pictures=3)
    kept = set(dataset.images.values_list("sha256", flat=True))
    others = {f"{number:064x}" for number in range(1700)}
    assert referenced(kept | others) == kept


def test_pictures_to_begin_from_are_kept_by_their_rows_and_by_requests_that_will_read_them(owner: User) -> None:
    picture, job = make_input_image(owner), make_job(owner)
    assert referenced([picture.sha256]) == {picture.sha256}
    Job.objects.filter(pk=job.pk).update(spec={"init_image": picture.sha256})
    picture.delete()
    assert referenced([picture.sha256]) == {picture.sha256}
    Job.objects.filter(pk=job.pk).update(spec={})
    assert referenced([picture.sha256]) == set()
