"""Retrying a job submits the same work with the same attachments, for every kind."""

import pytest

from jobs.errors import Conflict
from jobs.models import GenerationRequest, InputImage, Job, TrainingRun
from jobs.retry import job_retry
from jobs.status import JobKind, JobState
from tests.jobs.admin.conftest import Site, make_job, site

__all__ = ["site"]


def ended(job: Job, state: JobState) -> Job:
    """The same job, as if it had ended that way."""
    code = {"error_code": "internal"} if state == JobState.FAILED else {}
    Job.objects.filter(pk=job.pk).update(state=state, lease_until=None, worker=None, finished_at=job.created_at, **code)
    job.refresh_from_db()
    return job


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
def test_a_generation_keeps_its_loras_weights_and_settings(state: JobState, site: Site) -> None:
    use = site.request.lora_uses.get()
    spec = {**site.request.job.spec, "loras": [{"sha256": use.lora_version.kohya_sha256, "weight": 0.8}]}
    Job.objects.filter(pk=site.request.job_id).update(spec=spec)
    again = job_retry(ended(site.request.job, state))
    assert again.spec == spec
    made = GenerationRequest.objects.get(job=again)
    assert [(u.lora_version, u.weight) for u in made.lora_uses.all()] == [(use.lora_version, 0.8)]
    assert (made.owner, made.base_model) == (site.creator, site.base)


def test_a_training_keeps_dataset_base_name_and_configuration(site: Site) -> None:
    again = job_retry(ended(site.training.job, JobState.FAILED))
    run = TrainingRun.objects.get(job=again)
    assert (run.dataset_version, run.base_model, run.lora_name) == (site.version, site.base, "blueprint")
    assert again.spec == site.training.job.spec
    assert run.losses == []


def test_a_base_preparation_becomes_the_newest_of_its_base(site: Site) -> None:
    assert site.base.job is not None
    again = job_retry(ended(site.base.job, JobState.FAILED))
    site.base.refresh_from_db()
    assert site.base.job == again


def test_work_whose_dataset_was_deleted_is_refused_with_the_reason(site: Site) -> None:
    orphan = make_job(site.creator, JobKind.PREPROCESS, JobState.CANCELLED, site.version.job.spec)
    with pytest.raises(Conflict, match="its dataset was deleted"):
        job_retry(orphan)


def test_a_generation_begins_from_the_same_picture_in_the_same_format(site: Site) -> None:
    picture = InputImage.objects.get(owner=site.creator)
    changes = {"init_image": picture.sha256, "denoising_strength": 0.4, "image_format": "webp"}
    Job.objects.filter(pk=site.request.job_id).update(spec={**site.request.job.spec, "loras": [], **changes})
    site.request.lora_uses.all().delete()

    again = job_retry(ended(site.request.job, JobState.FAILED))

    assert {name: again.spec[name] for name in changes} == changes
    assert again.spec_version == 2
