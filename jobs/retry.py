"""A second try of a job that ended without a result: a new job with the same specification and attachments.

Called by the admin's "retry" action. The ended job itself never changes.
"""

from core.config import GenerateConfig, PreprocessConfig
from core.train_config import TrainConfig
from jobs.errors import Conflict
from jobs.lora_imports import lora_import_again
from jobs.models import Job
from jobs.status import JobKind, JobState
from jobs.submission import base_preparation_submit, generation_submit, preprocess_submit, training_submit

RETRYABLE = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
"""Ended without a result. A succeeded job has nothing to retry, an active one is still trying."""


def job_retry(job: Job) -> Job:
    """Submit a new job of the same owner, from the stored specification and the rows that the old job was attached to.

    Returns:
        The new job, QUEUED.

    Raises:
        Conflict: The job is still active, has succeeded, or what it worked on was deleted.
        NotReady, InvalidInput: What it worked on changed since, so that the same request is refused today.
    """
    if job.state not in RETRYABLE:
        raise Conflict(
            f"job {job.pk} is {job.state}: only jobs that ended as {', '.join(sorted(RETRYABLE))} can be retried"
        )
    match job.kind:
        case JobKind.PREPROCESS:
            return _retry_preprocess(job)
        case JobKind.TRAIN:
            return _retry_training(job)
        case JobKind.GENERATE:
            return _retry_generation(job)
        case JobKind.PREPARE_BASE:
            return _retry_base_preparation(job)
        case JobKind.IMPORT_LORA:
            if not hasattr(job, "lora_import"):
                raise _gone(job, "upload")
            return lora_import_again(job)
    raise Conflict(f"jobs of kind {job.kind!r} cannot be retried")


def _retry_preprocess(job: Job) -> Job:
    version = getattr(job, "dataset_version", None)
    if version is None:
        raise _gone(job, "dataset")
    return preprocess_submit(owner=job.owner, dataset=version.dataset, config=PreprocessConfig.parse(job.spec))


def _retry_training(job: Job) -> Job:
    run = getattr(job, "training_run", None)
    if run is None:
        raise _gone(job, "training run")
    return training_submit(
        owner=job.owner,
        dataset_version=run.dataset_version,
        base_model=run.base_model,
        lora_name=run.lora_name,
        config=TrainConfig.parse(job.spec),
    )


def _retry_generation(job: Job) -> Job:
    request = getattr(job, "generation_request", None)
    if request is None:
        raise _gone(job, "generation request")
    uses = request.lora_uses.select_related("lora_version__lora__base_model").order_by("id")
    values = GenerateConfig.parse(job.spec).dump()
    del values["loras"]  # generation_submit writes them anew from the versions
    return generation_submit(
        owner=job.owner,
        base_model=request.base_model,
        loras=[(use.lora_version, use.weight) for use in uses],
        values=values,
    )


def _retry_base_preparation(job: Job) -> Job:
    if job.base_model is None:
        raise _gone(job, "base model")
    return base_preparation_submit(owner=job.owner, base_model=job.base_model)


def _gone(job: Job, what: str) -> Conflict:
    return Conflict(f"job {job.pk} cannot be retried: its {what} was deleted")
